"""A process that never imports this package loads the folders and computes the same logits."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from lightning_compress.export.load import load
from lightning_compress.export.save import save
from lightning_compress.modifiers.quantization import QuantizationModifier
from lightning_compress.oneshot import compress
from lightning_compress.quant.packed import PackedLinear
from tests.support.architecture_models import ARCHITECTURES

LLAMA = {
    "w4a16": {"name": "W4A16"},
    "w4a16_asymmetric": {"name": "", "num_bits": 4, "group_size": 64, "symmetric": False},
    "w4a16_channel": {"name": "", "num_bits": 4, "strategy": "channel"},
    "w4a16_tensor": {"name": "", "num_bits": 4, "strategy": "tensor"},
    "w8a16": {"name": "W8A16"},
    "w8a16_asymmetric_channel": {"name": "", "num_bits": 8, "strategy": "channel", "symmetric": False},
    "w8a8": {"name": "W8A8"},
    "w8a8_static": {"name": "static"},
    "w8a8_asymmetric_inputs": {"name": "token"},
    "w8a8_static_asymmetric": {"name": "static asymmetric"},
    "w4a8": {"name": "W4A8"},
    "fp8_dynamic": {"name": "FP8_DYNAMIC"},
    "fp8_static": {"name": "FP8"},
    "bfloat16": {"name": "W8A16"},
    "bfloat16_asymmetric": {"name": "", "num_bits": 8, "group_size": 64, "symmetric": False},
    "w3a16": {"name": "", "num_bits": 3, "group_size": 64},
    "w2a16": {"name": "", "num_bits": 2, "group_size": 64},
    "w5a16": {"name": "", "num_bits": 5, "group_size": 32},
}


def llama(case):
    def make(tiny_llama, quantize, scheme_of):
        dtype = torch.bfloat16 if "bfloat16" in case else torch.float32
        model = tiny_llama(dtype, tie_word_embeddings="asymmetric" in case)
        quantize(model, scheme_of(**LLAMA[case]), ["re:.*lm_head"])
        return model, "AutoModelForCausalLM", {"input_ids": torch.arange(24).reshape(2, 12)}

    return make


def two_schemes(tiny_llama, quantize, scheme_of):
    """One target, told apart by ignore lists only: the config must name modules."""
    model = tiny_llama()
    quantize(model, scheme_of("W4A16"), ["re:.*lm_head", "re:.*mlp"])
    quantize(model, scheme_of("W8A8"), ["re:.*lm_head", "re:.*self_attn"])
    return model, "AutoModelForCausalLM", {"input_ids": torch.arange(24).reshape(2, 12)}


def tied_head(tiny_llama, quantize, scheme_of):
    model = quantize(tiny_llama(tie_word_embeddings=True), scheme_of("W4A16"))
    return model, "AutoModelForCausalLM", {"input_ids": torch.arange(24).reshape(2, 12)}


def untied_head(tiny_llama, quantize, scheme_of):
    """The head was given a weight of its own, and the config still says tied."""
    model = tiny_llama(tie_word_embeddings=True)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return quantize(model, scheme_of("W4A16")), "AutoModelForCausalLM", {"input_ids": torch.arange(24).reshape(2, 12)}


def gpt2(tiny_llama, quantize, scheme_of):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=64, n_embd=128, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=0)
    model = quantize(GPT2LMHeadModel(config), scheme_of("", ["Conv1D"], num_bits=4, group_size=64))
    return model, "AutoModelForCausalLM", {"input_ids": torch.arange(24).reshape(2, 12)}


def bert(tiny_llama, quantize, scheme_of):
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
    model = quantize(BertForMaskedLM(BertConfig(**sizes, num_attention_heads=4)), scheme_of("W4A16"), ["re:.*decoder"])
    return model, "BertForMaskedLM", {"input_ids": torch.arange(24).reshape(2, 12)}


def t5(tiny_llama, quantize, scheme_of):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=64, d_model=128, d_ff=256, num_layers=1, num_heads=4, d_kv=32)
    model = quantize(T5ForConditionalGeneration(config), scheme_of("W4A16"), ["lm_head"])
    ids = torch.arange(24).reshape(2, 12)
    return model, "T5ForConditionalGeneration", {"input_ids": ids, "decoder_input_ids": ids.clone()}


def vit(tiny_llama, quantize, scheme_of):
    """transformers 5 renames its modules on their way to the disk."""
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"image_size": 32, "patch_size": 16, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    model = ViTForImageClassification(ViTConfig(**sizes, num_attention_heads=4))
    quantize(model, scheme_of("W4A16"), ["classifier", "re:.*0.*q_proj"])
    return model, "ViTForImageClassification", {"pixel_values": torch.randn(1, 3, 32, 32)}


def only_pruned(tiny_llama, quantize, scheme_of):
    model = tiny_llama(tie_word_embeddings=True)
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data[:, ::2] = 0
    return model, "AutoModelForCausalLM", {"input_ids": torch.arange(24).reshape(2, 12)}


CASES = {case: llama(case) for case in LLAMA} | {
    f.__name__: f for f in (only_pruned, two_schemes, tied_head, untied_head, gpt2, bert, t5, vit)
}


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory, tiny_llama, quantize, scheme_of, read_by_transformers):
    """(folder, logits of the models in memory, logits of the reader)."""
    root = tmp_path_factory.mktemp("reload")
    logits, classes = {}, {}
    for name, make in CASES.items():
        torch.manual_seed(0)
        model, classes[name], batch = make(tiny_llama, quantize, scheme_of)
        model.eval()
        with torch.no_grad():
            logits[name] = model(**batch).logits
        save(model, root / name)
        save_file(batch, root / f"{name}.batch")
    return root, logits, read_by_transformers(root, classes)


@pytest.mark.filterwarnings("ignore:.*written with dense weights")
@pytest.mark.parametrize("case", CASES)
def test_plain_transformers_gives_the_logits_of_the_model_in_memory(reloaded, case):
    _, in_memory, read = reloaded
    assert in_memory[case].std() > 0.01
    assert_close(read[case], in_memory[case], rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*written with dense weights")
@pytest.mark.parametrize("case", CASES)
def test_load_gives_the_logits_too_and_saves_the_same_bytes(reloaded, case, tmp_path):
    root, in_memory, _ = reloaded
    model = load(root / case, packed=False)
    with torch.no_grad():
        again = model(**load_file(root / f"{case}.batch")).logits
    assert_close(again, in_memory[case], rtol=0, atol=0)
    save(model, tmp_path / "again")
    assert {f.name: f.read_bytes() for f in (root / case).iterdir()} == {
        f.name: f.read_bytes() for f in (tmp_path / "again").iterdir()
    }


def test_a_head_tied_to_the_embedding_is_written_once(reloaded):
    root, _, _ = reloaded
    names = load_file(root / "w4a16_asymmetric" / "model.safetensors").keys()
    assert "model.embed_tokens.weight" in names
    assert not [name for name in names if name.startswith("lm_head")]


def test_config_names_modules_where_targets_cannot_tell_schemes_apart(reloaded):
    root, _, _ = reloaded
    config = json.loads((root / "two_schemes" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    by_format = {group["format"]: group["targets"] for group in config["config_groups"].values()}
    assert all("self_attn" in target for target in by_format["pack-quantized"])
    assert all("mlp" in target for target in by_format["int-quantized"])
    assert config["ignore"] == ["lm_head"]


def test_what_transformers_cannot_load_is_said(tmp_path, tiny_llama, quantize, scheme_of):
    """Zero points beside another scheme, and experts: our own load reads both."""
    from transformers import MixtralConfig, MixtralForCausalLM

    llama = tiny_llama()
    quantize(llama, scheme_of("", ["re:.*mlp.*proj"], num_bits=4, group_size=64, symmetric=False))
    quantize(llama, scheme_of("W8A8", ["re:.*self_attn.*proj"]))
    sizes = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2}
    mixtral = quantize(MixtralForCausalLM(MixtralConfig(**sizes, **heads)), scheme_of("W4A16"), ["lm_head"])
    messages = {
        "zero": "zero points.*lightning_compress.load reads it; with one scheme",
        "experts": "experts.*unless others are in FP8.*save.*verify=True. tries it",
    }
    for (name, message), model in zip(messages.items(), (llama, mixtral), strict=True):
        with pytest.warns(UserWarning, match=f"transformers 5[.0-9]* will fail to load this folder.*: .*{message}"):
            save(model, tmp_path / name)
        again = load(tmp_path / name, packed=False)
        ids = torch.arange(24).reshape(2, 12)
        with torch.no_grad():
            assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=0)
        with pytest.raises(RuntimeError):
            type(model).from_pretrained(tmp_path / name)


@pytest.mark.parametrize("name", ["vit", "clip", "whisper", "mamba"])
def test_models_that_cannot_be_called_with_tokens_alone_are_loaded_packed(tmp_path, name):
    """The trial call that looks for siblings fails for CLIP and Whisper; Mamba reads a weight without its Linear."""
    architecture = ARCHITECTURES[name]
    model, batches = architecture.build(), architecture.batches(1)
    compress(model, QuantizationModifier(scheme="W8A8", ignore=["re:lm_head", "re:proj_out"]), batches)
    loaded = load(save(model, tmp_path / "out"))
    with torch.no_grad():
        out, expected = loaded(**batches[0]), model(**batches[0])
    key = "logits_per_image" if name == "clip" else "logits"
    assert any(isinstance(module, PackedLinear) for module in loaded.modules())
    assert (out[key] - expected[key]).norm() < 0.05 * expected[key].norm()
    if name in ("clip", "whisper"):
        with pytest.raises(ValueError, match="nothing to fuse, its dummy inputs fail"):
            load(tmp_path / "out", fuse=True)
    if name == "vit":
        fused = load(tmp_path / "out", fuse=True)
        with torch.no_grad():
            assert (fused(**batches[0])[key] - out[key]).norm() < 1e-5 * out[key].norm()
