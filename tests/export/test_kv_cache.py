"""A quantized KV cache: its arithmetic, in memory and after a reload in plain transformers."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from lightning_compress.core import Lifecycle, State
from lightning_compress.export.compressed_tensors import load, save
from lightning_compress.modifiers.kv_cache import KVCacheModifier
from lightning_compress.modifiers.quantization import QuantizationModifier
from lightning_compress.oneshot import compress
from lightning_compress.quant.kv_cache import attention_modules, cache_of, detach_cache

IDS = torch.arange(24).reshape(2, 12)
GRIDS = [(f, s) for f in ("fp8", "int8", "int4") for s in ("tensor", "head", "token")]
CASES = {f"{f} {s}": {"format": f, "strategy": s} for f, s in GRIDS}


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


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tiny_llama, read_by_transformers):
    root, models = tmp_path_factory.mktemp("kv"), {}
    for weights in (False, True):
        for case, arguments in CASES.items():
            name = f"{case} {'W4A16' if weights else 'dense'}"
            models[name] = quantized(tiny_llama(), weights, **arguments)
            save(models[name], root / name)
            save_file({"input_ids": IDS}, root / f"{name}.batch")
    return root, models, read_by_transformers(root, dict.fromkeys(models, "AutoModelForCausalLM"))


@pytest.mark.parametrize("weights", ["dense", "W4A16"])
@pytest.mark.parametrize("case", CASES)
def test_plain_transformers_and_our_load_give_the_logits_of_the_model_in_memory(exported, tiny_llama, case, weights):
    root, models, read = exported
    name = f"{case} {weights}"
    assert_close(read[name], logits(models[name]), rtol=0, atol=1e-5)
    assert_close(logits(load(root / name, packed=False)), logits(models[name]), rtol=0, atol=0)
    if weights == "dense":
        assert (logits(models[name]) - logits(tiny_llama())).std() > 1e-4                   # it does something
    tensors = load_file(root / name / "model.safetensors")
    scales = {key: value.shape for key, value in tensors.items() if "self_attn.k_scale" in key}
    shape = {"tensor": (1,), "head": (2, 1, 1)}.get(case.split()[1])
    assert scales == ({} if shape is None else {f"model.layers.{i}.self_attn.k_scale": shape for i in (0, 1)})
    config = json.loads((root / name / "config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"]["num_bits"] == int(case[case.index(" ") - 1])


@pytest.mark.parametrize("strategy", ["tensor", "head", "token"])
def test_the_grid_by_its_definition(tiny_llama, strategy):
    model = tiny_llama()
    dense = keys_and_values(model)
    found = keys_and_values(quantized(model, False, format="int4", strategy=strategy))
    over = {"tensor": (0, 1, 2, 3), "head": (0, 2, 3), "token": (3,)}[strategy]
    for x, q in zip(dense, found, strict=True):
        scale = x.abs().amax(over, keepdim=True) / 7.5
        assert_close(q, (x / scale).round().clamp(-8, 7) * scale)


def test_padding_does_not_stretch_scales(tiny_llama):
    whole, padded = tiny_llama(), tiny_llama()
    compress(whole, KVCacheModifier(), [{"input_ids": IDS[:1]}])
    mask = torch.ones_like(IDS)
    mask[1] = 0
    compress(padded, KVCacheModifier(), [{"input_ids": IDS, "attention_mask": mask}])
    for name, module in attention_modules(whole).items():
        assert_close(cache_of(padded.get_submodule(name)).k_scale, cache_of(module).k_scale)


def test_decoding_with_a_cache_gives_what_one_pass_gives(tiny_llama):
    model = quantized(tiny_llama(), False, strategy="head")
    whole = logits(model)
    with torch.no_grad():
        first = model(input_ids=IDS[:, :7], use_cache=True)
        rest = model(input_ids=IDS[:, 7:], past_key_values=first.past_key_values, use_cache=True)
    assert_close(torch.cat([first.logits, rest.logits], 1), whole, rtol=0, atol=1e-5)
    assert model.generate(IDS, max_new_tokens=3, do_sample=False).shape == (2, 15)


def test_a_copy_keeps_it_and_detach_takes_it_off(tiny_llama):
    model = quantized(tiny_llama(), False)
    assert list(model.state_dict()) == list(tiny_llama().state_dict())
    other = copy.deepcopy(model)
    assert_close(logits(other), logits(model), rtol=0, atol=0)
    for module in attention_modules(other).values():
        detach_cache(module)
    assert_close(logits(other), logits(tiny_llama()), rtol=0, atol=0)


def test_the_ledger_says_it(tiny_llama):
    ledger = compress(tiny_llama(), KVCacheModifier(strategy="head"), [{"input_ids": IDS}])
    assert [(r.module, r.scheme) for r in ledger] == [
        (f"model.layers.{i}.self_attn", "KV FP8 head") for i in range(2)
    ]


# -- bad input --------------------------------------------------------------------------------------------------------


def test_models_without_such_attention():
    from transformers import T5Config, T5ForConditionalGeneration

    with pytest.raises(ValueError, match="this Sequential has no attention module whose keys and values can be quant"):
        Lifecycle([KVCacheModifier()]).initialize(State(model=nn.Sequential(nn.Linear(4, 4))))
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=8, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8))
    with pytest.raises(ValueError, match="no attention module|keeps two caches"):
        Lifecycle([KVCacheModifier()]).initialize(State(model=t5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "fp4"}, "format='fp4': Input should be 'fp8', 'int8' or 'int4'"),
        ({"strategy": "channel"}, "strategy"),
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
    detach_cache(model.model.layers[1].self_attn)
    with pytest.raises(ValueError, match="of 1 attention modules is quantized, that of model.layers.1.self_attn is n"):
        save(model, tmp_path / "out")
