"""Every preset of compressed-tensors: rounded, exported, and read by plain transformers and by our own load."""

import copy

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from lightning_compress.export.load import load
from lightning_compress.export.save import save
from lightning_compress.export.tensors import read_json
from lightning_compress.modifiers.quantization import QuantizationModifier
from lightning_compress.oneshot import compress
from lightning_compress.quant.record import Quantized
from lightning_compress.quant.schemes import describe, presets
from lightning_compress.recipe import load_recipe

PRESETS = [*(name for name in PRESET_SCHEMES if name != "UNQUANTIZED"), "INT8_STATIC", "INT8_STATIC_SYM"]
BFLOAT16 = ("NVFP4", "MXFP4", "MXFP4XFP8", "MXFP6A8", "MXFP8")  # microscaled weights and activations
CASES = [*PRESETS, *(f"{name} in bfloat16" for name in (*BFLOAT16, "NVFP4A16", "FP8_BLOCK"))]
IDS = torch.arange(24).reshape(2, 12)
pytestmark = pytest.mark.filterwarnings("ignore:config.json says dtype bfloat16")


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tiny_llama, read_by_transformers):
    """(folder, models in memory, logits of a process without this package)."""
    root, models = tmp_path_factory.mktemp("presets"), {}
    for case in CASES:
        dtype = torch.bfloat16 if "bfloat16" in case else torch.float32
        models[case] = model = tiny_llama(dtype, num_hidden_layers=1)
        compress(model, QuantizationModifier(scheme=case.split()[0], ignore=["lm_head"]), [{"input_ids": IDS}])
        save(model, root / case)
        save_file({"input_ids": IDS}, root / f"{case}.batch")
    return root, models, read_by_transformers(root, dict.fromkeys(CASES, "AutoModelForCausalLM"))


def test_every_preset_works():
    assert presets() == PRESETS
    assert len(PRESETS) == 34


@pytest.mark.parametrize("case", CASES)
def test_plain_transformers_gives_the_logits_of_the_model_in_memory(exported, case):
    _, models, read = exported
    assert read[case].dtype == (torch.bfloat16 if case in BFLOAT16 else models[case].dtype)
    if case not in BFLOAT16:
        assert_close(read[case], logits(models[case]), rtol=0, atol=1e-5)
        return
    cast = copy.deepcopy(models[case]).to(torch.bfloat16)
    cast.model.rotary_emb = models[case].model.rotary_emb  # from_pretrained leaves its tables in float32
    assert_close(read[case], logits(cast), rtol=0, atol=1e-3)
    assert (read[case].float() - logits(models[case])).std() < 0.2 * logits(models[case]).std()


@pytest.mark.parametrize("case", CASES)
def test_our_load_gives_exactly_the_model_in_memory(exported, case):
    root, models, _ = exported
    again, model = load(root / case, packed=False), models[case]
    assert again.dtype == model.dtype
    assert_close(logits(again), logits(model), rtol=0, atol=0)
    for name, (_, record) in Quantized.find(model).items():
        its = Quantized.of(again.get_submodule(name))
        for field in ("scale", "zero_point", "input_scale", "global_scale", "input_global_scale"):
            assert (getattr(record, field) is None) == (getattr(its, field) is None)
            assert_close(getattr(its, field), getattr(record, field), rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_decompression_by_compressed_tensors_gives_every_weight(exported, case):
    root, models, _ = exported
    config = QuantizationConfig.model_validate(read_json(root / case / "config.json")["quantization_config"])
    (scheme,) = config.config_groups.values()
    tensors = load_file(root / case / "model.safetensors")
    for name, (module, _) in Quantized.find(models[case]).items():
        state = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        found = BaseCompressor.get_value_from_registry(scheme.format).decompress(state, scheme)["weight"]
        assert torch.equal(found.to(module.weight.dtype), module.weight)


def test_nvfp4_on_disk(exported):
    """Scales in E4M3, global scales in float32, one for what servers fuse."""
    root, models, _ = exported
    tensors = load_file(root / "NVFP4" / "model.safetensors")
    layer = "model.layers.0"
    q, o = f"{layer}.self_attn.q_proj", f"{layer}.self_attn.o_proj"
    assert tensors[f"{q}.weight_packed"].dtype == torch.uint8
    assert tensors[f"{q}.weight_packed"].shape == (128, 64)
    assert tensors[f"{q}.weight_scale"].dtype == torch.float8_e4m3fn
    assert tensors[f"{q}.weight_scale"].shape == (128, 8)
    shared = {n: tensors[f"{layer}.self_attn.{n}_proj.weight_global_scale"].item() for n in "qkvo"}
    assert shared["q"] == shared["k"] == shared["v"] != shared["o"]
    assert tensors[f"{q}.input_global_scale"].dtype == torch.float32
    dense = Quantized.of(models["NVFP4"].get_submodule(o))
    stored = dense.scale * dense.global_scale
    assert torch.equal(stored.to(torch.float8_e4m3fn), tensors[f"{o}.weight_scale"])
    assert tensors[f"{o}.weight_scale"].float().max() == 448  # the whole range is used
    mx = load_file(root / "MXFP6A16" / "model.safetensors")
    assert mx[f"{q}.weight_scale"].dtype == torch.uint8
    assert mx[f"{q}.weight_packed"].shape == (128, 96)
    block = load_file(root / "FP8_BLOCK" / "model.safetensors")
    assert block[f"{layer}.mlp.down_proj.weight_scale"].shape == (1, 2)


def test_two_microscaled_schemes_in_float32(tmp_path, tiny_llama, read_by_transformers):
    model = tiny_llama()
    schemes = {"NVFP4A16": ["re:.*self_attn.*proj"], "MXFP8A16": ["re:.*mlp.*proj"]}
    compress(model, QuantizationModifier(scheme=schemes))
    with pytest.warns(UserWarning, match="says dtype bfloat16, not torch.float32: .*lightning_compress.load keeps"):
        save(model, tmp_path / "two")
    assert_close(logits(load(tmp_path / "two")), logits(model), rtol=0, atol=0)
    save_file({"input_ids": IDS}, tmp_path / "two.batch")
    read = read_by_transformers(tmp_path, {"two": "AutoModelForCausalLM"})["two"]
    assert read.dtype == torch.bfloat16
    assert_close(read.float(), logits(model), rtol=0, atol=0.03)


def test_attention_and_mlp_by_the_recipe_of_two_schemes(tmp_path, tiny_llama, read_by_transformers):
    model = tiny_llama()
    compress(model, load_recipe("mixed_w8a8_w4"), [{"input_ids": torch.arange(64).reshape(2, 32)}])
    layer = model.model.layers[0]
    names = ("self_attn.q_proj", "mlp.up_proj")
    kinds = {name: describe(Quantized.of(layer.get_submodule(name)).scheme) for name in names}
    assert kinds == {"self_attn.q_proj": "W8A8 channel sym", "mlp.up_proj": "W4A16 g64 sym"}
    save(model, tmp_path / "mixed")
    save_file({"input_ids": IDS}, tmp_path / "mixed.batch")
    read = read_by_transformers(tmp_path, {"mixed": "AutoModelForCausalLM"})["mixed"]
    assert_close(read, logits(model), rtol=0, atol=1e-5)
    assert_close(logits(load(tmp_path / "mixed", packed=False)), logits(model), rtol=0, atol=0)
