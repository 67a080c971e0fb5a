"""A folder that is read by plain transformers in a new process, and what is said where its answers are others."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_compress.export.save import save
from lightning_compress.export.verify import answers, is_wanted
from lightning_compress.modifiers.quantization import QuantizationModifier
from lightning_compress.oneshot import compress
from tests.support.architecture_models import ARCHITECTURES

IDS = torch.arange(24).reshape(2, 12)


def test_a_right_folder_and_one_with_another_weight(tmp_path, tiny_llama):
    model = tiny_llama().train()
    compress(model, QuantizationModifier(scheme="W8A8", ignore=["lm_head"]))
    folder = save(model, tmp_path / "out", verify=True)
    assert model.training
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight_scale"] *= 1.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    gap, fault = answers(model, folder, lambda: model(IDS, use_cache=False))
    assert 0.02 < gap < 1
    assert fault.startswith("transformers 5.")
    assert f" loads {folder} without an error" in fault
    assert f"its logits differ by {100 * gap:.3g} % of their norm" in fault


@pytest.mark.slow
def test_random_experts_are_garbage_and_said_to_be(tmp_path):
    model = ARCHITECTURES["qwen3_moe"].build()
    compress(model, QuantizationModifier(scheme="NVFP4A16", ignore=["lm_head", "re:.*gate$"]))
    with pytest.raises(ValueError, match=r"loads .* without an error and gives other outputs: .* with random weights;"):
        save(model, tmp_path / "out", verify=True)
    assert (tmp_path / "out" / "config.json").exists()


def test_when_it_is_wanted(tmp_path, tiny_llama, monkeypatch):
    model = tiny_llama()
    folder = save(model, tmp_path / "out")
    monkeypatch.setattr("lightning_compress.export.verify.AUTO_BYTES", 2 * 10**9)
    assert is_wanted(model, folder, "auto")
    assert not is_wanted(model, folder, False)
    assert not is_wanted(nn.Linear(2, 2), folder, "auto")
    monkeypatch.setattr("lightning_compress.export.verify.AUTO_BYTES", 10)
    assert not is_wanted(model, folder, "auto")
    assert is_wanted(model, folder, True)


def test_what_cannot_be_read_so(tmp_path, tiny_llama):
    assert answers(nn.Linear(2, 2), tmp_path) == (
        None,
        f"{tmp_path} is not verified: a Linear is not a model of transformers, and no other process can build it; "
        "compare lightning_compress.load(folder, a freshly built one) with it on a batch",
    )
    gap, fault = answers(tiny_llama(), tmp_path, lambda: None)
    assert gap is None
    assert "the model was not called with tensors and numbers by name" in fault
