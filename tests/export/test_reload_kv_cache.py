"""A quantized KV cache after a reload, in plain transformers and by load."""

import json

import pytest
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from lightning_compress.export.load import load
from lightning_compress.export.save import save
from lightning_compress.modifiers.kv_cache import KVCacheModifier
from lightning_compress.oneshot import compress
from lightning_compress.quant.kv_cache import QuantizedCache, unread_caches
from tests.support.architecture_models import ARCHITECTURES, GROUPED, PICTURE
from tests.support.kv_caches import IDS, logits, quantized

GRIDS = [(f, s) for f in ("fp8", "int8", "int4") for s in ("tensor", "head", "token")]


CASES = {f"{f} {s}": {"format": f, "strategy": s} for f, s in GRIDS} | {
    f"{f} {s} asymmetric": {"format": f, "strategy": s, "symmetric": False} for f, s in GRIDS if f != "fp8"
}


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


def test_renamed_on_disk(tmp_path):
    """Gemma 3 has language_model.model.layers on the disk and model.language_model.layers in memory."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {**GROUPED, "head_dim": 8, "num_hidden_layers": 1}
    vision = {**PICTURE, "num_hidden_layers": 1}
    special = {"image_token_index": 45, "boi_token_index": 46, "eoi_token_index": 47, "mm_tokens_per_image": 4}
    config = Gemma3Config(text_config=text, vision_config=vision, **special)
    model = Gemma3ForConditionalGeneration(config).eval()
    batch = {"input_ids": IDS, "token_type_ids": 0 * IDS}
    with pytest.warns(UserWarning, match=r"no calibration batch reached 'model.vision_tower'"):
        compress(model, KVCacheModifier(), [batch])
    with pytest.warns(UserWarning, match="no processor is saved with it"):
        save(model, tmp_path / "out")
    assert "language_model.model.layers.0.self_attn.k_scale" in load_file(tmp_path / "out" / "model.safetensors")
    assert_close(logits(load(tmp_path / "out"), **batch), logits(model, **batch), rtol=0, atol=0)


def test_a_cache_that_the_installed_loader_does_not_find(tmp_path, tiny_llama, monkeypatch):
    model = quantized(tiny_llama(), False)
    monkeypatch.setattr("lightning_compress.quant.kv_cache.is_cached_attention_module", lambda module: False)
    with pytest.warns(UserWarning, match=r"transformers 5\..* not quantize its KV cache.*model\.layers\.0\.self_at"):
        save(model, tmp_path / "out")
    assert_close(logits(load(tmp_path / "out")), logits(model), rtol=0, atol=0)


def test_twice_and_only_in_part(tmp_path, tiny_llama):
    model = quantized(tiny_llama(), False)
    with pytest.raises(ValueError, match=r"the KV cache of 'model.layers.0.self_attn' is quantized already"):
        quantized(model, False)
    QuantizedCache.detach(model.model.layers[1].self_attn)
    with pytest.raises(ValueError, match="of 1 attention modules is quantized, that of model.layers.1.self_attn is n"):
        save(model, tmp_path / "out")
