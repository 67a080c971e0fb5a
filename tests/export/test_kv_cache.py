"""A quantized KV cache: its arithmetic, in memory and after a reload in plain transformers."""

import copy
import json

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.lifecycle.initialize import is_cached_attention_module
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from lightning_compress.core import Lifecycle, State
from lightning_compress.export.load import load
from lightning_compress.export.save import save
from lightning_compress.modifiers.kv_cache import KVCacheModifier
from lightning_compress.modifiers.quantization import QuantizationModifier
from lightning_compress.oneshot import compress
from lightning_compress.quant import kv_cache
from lightning_compress.quant.kv_cache import QuantizedCache, attention_modules, unread_caches
from tests.support.architecture_models import ARCHITECTURES, GROUPED, PICTURE

IDS = torch.arange(24).reshape(2, 12)
GRIDS = [(f, s) for f in ("fp8", "int8", "int4") for s in ("tensor", "head", "token")]
CASES = {f"{f} {s}": {"format": f, "strategy": s} for f, s in GRIDS} | {
    f"{f} {s} asymmetric": {"format": f, "strategy": s, "symmetric": False} for f, s in GRIDS if f != "fp8"
}


def logits(model, **batch):
    with torch.no_grad():
        return model(**(batch or {"input_ids": IDS})).logits


def quantized(model, weights, **arguments):
    modifiers = [KVCacheModifier(**arguments)]
    if weights:
        modifiers.append(QuantizationModifier(scheme="W4A16", ignore=["lm_head"]))
    compress(model, modifiers, [{"input_ids": IDS}])
    return model


def keys_and_values(model):
    """What the first layer put into its cache: [B, H, T, D] each."""
    with torch.no_grad():
        layer = model(input_ids=IDS, use_cache=True).past_key_values.layers[0]
    return layer.keys, layer.values


WEIGHTS = [(case, w) for case in CASES for w in ("dense", "W4A16") if w == "dense" or case in (
    "fp8 tensor", "fp8 token", "int8 head", "int8 tensor asymmetric", "int4 head asymmetric", "int4 token asymmetric"
)]  # fmt: skip


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tiny_llama, read_by_transformers):
    root, models = tmp_path_factory.mktemp("kv"), {}
    for case, weights in WEIGHTS:
        name = f"{case} {weights}"
        models[name] = quantized(tiny_llama(), weights == "W4A16", **CASES[case])
        save(models[name], root / name)
        save_file({"input_ids": IDS}, root / f"{name}.batch")
    models["opt"] = quantized(ARCHITECTURES["opt"].build(), False, format="int4", strategy="head", symmetric=False)
    save(models["opt"], root / "opt")
    save_file({"input_ids": IDS}, root / "opt.batch")
    return root, models, read_by_transformers(root, dict.fromkeys(models, "AutoModelForCausalLM"))


@pytest.mark.parametrize(("case", "weights"), WEIGHTS)
def test_plain_transformers_and_our_load_give_the_logits_of_the_model_in_memory(exported, tiny_llama, case, weights):
    root, models, read = exported
    name = f"{case} {weights}"
    if not unread_caches(models[name]):  # transformers 5.24 hides them from compressed-tensors 0.20
        assert_close(read[name], logits(models[name]), rtol=0, atol=1e-5)
    assert_close(logits(load(root / name, packed=False)), logits(models[name]), rtol=0, atol=0)
    if weights == "dense":
        assert (logits(models[name]) - logits(tiny_llama())).std() > 1e-4  # it does something
    tensors = load_file(root / name / "model.safetensors")
    found = {key: value.shape for key, value in tensors.items() if "self_attn.k_" in key and "proj" not in key}
    shape = {"tensor": (1,), "head": (2, 1, 1)}.get(case.split()[1])
    names = ["k_scale", "k_zero_point"] if case.endswith("asymmetric") else ["k_scale"]
    assert found == ({} if shape is None else {f"model.layers.{i}.self_attn.{n}": shape for i in (0, 1) for n in names})
    scheme = json.loads((root / name / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert scheme["num_bits"] == int(case[case.index(" ") - 1])
    assert scheme["symmetric"] is not case.endswith("asymmetric")


def test_a_model_whose_config_has_no_heads_of_keys(exported):
    """compressed-tensors asks for num_key_value_heads, which OPT's config does not have."""
    root, models, read = exported
    if not unread_caches(models["opt"]):
        assert_close(read["opt"], logits(models["opt"]), rtol=0, atol=1e-5)
    assert_close(logits(load(root / "opt")), logits(models["opt"]), rtol=0, atol=0)
    assert (logits(models["opt"]) - logits(ARCHITECTURES["opt"].build())).abs().max() > 1e-2
    assert json.loads((root / "opt" / "config.json").read_text())["num_key_value_heads"] == 4


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("strategy", ["tensor", "head", "token"])
def test_the_grid_by_its_definition(tiny_llama, strategy, symmetric):
    model = shifted(tiny_llama())
    dense = keys_and_values(model)
    found = keys_and_values(quantized(model, False, format="int4", strategy=strategy, symmetric=symmetric))
    over = {"tensor": (0, 1, 2, 3), "head": (0, 2, 3), "token": (3,)}[strategy]
    for x, q in zip(dense, found, strict=True):
        low, high = x.amin(over, keepdim=True).clamp_max(0), x.amax(over, keepdim=True).clamp_min(0)
        scale = (high - low) / 15 if not symmetric else torch.maximum(-low, high) / 7.5
        zero = 0 if symmetric else (-8 - low / scale).round()
        assert_close(q, ((x / scale + zero).round().clamp(-8, 7) - zero) * scale)


def shifted(model):
    """Values of the first layer off zero."""
    attention = model.model.layers[0].self_attn
    attention.v_proj.bias = nn.Parameter(torch.full((attention.v_proj.out_features,), 0.5))
    return model


@pytest.mark.parametrize("strategy", ["tensor", "head", "token"])
def test_zero_points_lose_less_where_values_do_not_lie_around_zero(tiny_llama, strategy):
    dense = keys_and_values(shifted(tiny_llama()))[1]
    error = {
        symmetric: float((keys_and_values(model)[1] - dense).square().mean())
        for symmetric in (True, False)
        for model in [quantized(shifted(tiny_llama()), False, format="int4", strategy=strategy, symmetric=symmetric)]
    }
    assert error[False] < 0.5 * error[True]


def test_padding_does_not_stretch_scales(tiny_llama):
    whole, padded = tiny_llama(), tiny_llama()
    compress(whole, KVCacheModifier(), [{"input_ids": IDS[:1]}])
    mask = torch.ones_like(IDS)
    mask[1] = 0
    compress(padded, KVCacheModifier(), [{"input_ids": IDS, "attention_mask": mask}])
    for name, module in attention_modules(whole).items():
        assert_close(QuantizedCache.of(padded.get_submodule(name)).k_scale, QuantizedCache.of(module).k_scale)


def test_decoding_with_a_cache_gives_what_one_pass_gives(tiny_llama):
    model = quantized(tiny_llama(), False, strategy="head")
    whole = logits(model)
    with torch.no_grad():
        first = model(input_ids=IDS[:, :7], use_cache=True)
        rest = model(input_ids=IDS[:, 7:], past_key_values=first.past_key_values, use_cache=True)
    assert_close(torch.cat([first.logits, rest.logits], 1), whole, rtol=0, atol=1e-5)
    assert model.generate(IDS, max_new_tokens=3, do_sample=False).shape == (2, 15)


@pytest.mark.parametrize("strategy", ["tensor", "head", "token"])
def test_gradients_pass_the_rounding_of_keys_and_values_straight_through(tiny_llama, strategy, monkeypatch):
    model = quantized(tiny_llama(num_hidden_layers=1), False, format="int8", strategy=strategy)

    def gradients():
        model.zero_grad()
        model(input_ids=IDS).logits.sin().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    mine, fake_quantize_input = gradients(), kv_cache.fake_quantize_input

    def straight(module, x, *grid):
        return x + (fake_quantize_input(module, x.detach(), *grid) - x).detach()

    monkeypatch.setattr(kv_cache, "fake_quantize_input", straight)
    expected = gradients()
    assert mine.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name, gradient in expected.items():
        assert_close(mine[name], gradient, rtol=1e-3, atol=1e-5)


def test_a_copy_keeps_it_and_detach_takes_it_off(tiny_llama):
    model = quantized(tiny_llama(), False)
    assert list(model.state_dict()) == list(tiny_llama().state_dict())
    other = copy.deepcopy(model)
    assert_close(logits(other), logits(model), rtol=0, atol=0)
    for module in attention_modules(other).values():
        QuantizedCache.detach(module)
    assert_close(logits(other), logits(tiny_llama()), rtol=0, atol=0)


def test_the_ledger_says_it(tiny_llama):
    for arguments, scheme in (({}, "KV FP8 head"), ({"format": "int8", "symmetric": False}, "KV INT8 head asymmetric")):
        ledger = compress(tiny_llama(), KVCacheModifier(strategy="head", **arguments), [{"input_ids": IDS}])
        assert [(r.module, r.scheme) for r in ledger] == [(f"model.layers.{i}.self_attn", scheme) for i in range(2)]


def test_renamed_on_disk(tmp_path):
    """Gemma 3 has language_model.model.layers on the disk and model.language_model.layers in memory."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {**GROUPED, "head_dim": 8, "num_hidden_layers": 1}
    vision = {**PICTURE, "num_hidden_layers": 1}
    special = {"image_token_index": 45, "boi_token_index": 46, "eoi_token_index": 47, "mm_tokens_per_image": 4}
    config = Gemma3Config(text_config=text, vision_config=vision, **special)
    model = Gemma3ForConditionalGeneration(config).eval()
    batch = {"input_ids": IDS, "token_type_ids": 0 * IDS}
    compress(model, KVCacheModifier(), [batch])
    save(model, tmp_path / "out")
    assert "language_model.model.layers.0.self_attn.k_scale" in load_file(tmp_path / "out" / "model.safetensors")
    assert_close(logits(load(tmp_path / "out"), **batch), logits(model, **batch), rtol=0, atol=0)


def test_a_cache_that_the_installed_loader_does_not_find(tmp_path, tiny_llama, monkeypatch):
    model = quantized(tiny_llama(), False)
    monkeypatch.setattr("lightning_compress.quant.kv_cache.is_cached_attention_module", lambda module: False)
    with pytest.warns(UserWarning, match=r"transformers 5\..* leave its KV cache as it is.*model\.layers\.0\.self_at"):
        save(model, tmp_path / "out")
    assert_close(logits(load(tmp_path / "out")), logits(model), rtol=0, atol=0)


# -- bad input --------------------------------------------------------------------------------------------------------


def test_models_without_such_attention():
    with pytest.raises(ValueError, match="this Sequential has no attention module whose keys and values can be quant"):
        Lifecycle([KVCacheModifier()]).initialize(State(model=nn.Sequential(nn.Linear(4, 4))))
    with pytest.raises(ValueError, match="this GPT2LMHeadModel has no attention module whose keys and values can be q"):
        Lifecycle([KVCacheModifier()]).initialize(State(model=ARCHITECTURES["gpt2"].build()))


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_encoder_decoders_are_refused_by_name(name):
    model = ARCHITECTURES[name].build()
    message = rf"{type(model).__name__} is an encoder-decoder, .* fails at its first call\. Leave the KV cache out"
    with pytest.raises(ValueError, match=message):
        Lifecycle([KVCacheModifier()]).initialize(State(model=model))


def test_what_loaders_do_with_an_encoder_decoder():
    """The reason of the refusal: what stands in the place of an EncoderDecoderCache cannot take keys."""
    model, scheme = ARCHITECTURES["bart"].build(), QuantizationArgs(num_bits=8)
    model.config.num_key_value_heads = 4
    if not any(is_cached_attention_module(module) for module in model.modules()):
        pytest.skip("this transformers hides its caches from compressed-tensors")
    apply_quantization_config(model, QuantizationConfig(config_groups={}, kv_cache_scheme=scheme))
    with pytest.raises(AttributeError, match="EncoderDecoderCache"):
        model(input_ids=IDS, decoder_input_ids=IDS)
    t5 = ARCHITECTURES["t5"].build()
    assert not attention_modules(t5)  # its projections have other names: nothing is quantized


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "fp4"}, "format='fp4': Input should be 'fp8', 'int8' or 'int4'"),
        ({"strategy": "channel"}, "strategy"),
        ({"symmetric": False}, "format='fp8' with symmetric=False: floating-point codes have no zero point"),
        ({"targets": ["Linear"]}, "unknown argument 'targets'"),
    ],
)
def test_arguments_that_do_not_work(arguments, message):
    with pytest.raises(ValueError, match=message):
        KVCacheModifier(**arguments)


def test_twice_and_only_in_part(tmp_path, tiny_llama):
    model = quantized(tiny_llama(), False)
    with pytest.raises(ValueError, match=r"the KV cache of 'model.layers.0.self_attn' is quantized already"):
        quantized(model, False)
    QuantizedCache.detach(model.model.layers[1].self_attn)
    with pytest.raises(ValueError, match="of 1 attention modules is quantized, that of model.layers.1.self_attn is n"):
        save(model, tmp_path / "out")
