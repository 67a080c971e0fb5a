"""Recipes that smooth, from one command line to a folder that plain transformers reads."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import train as app
from examples.model_llama import LlamaDemo
from tests.test_train import TINY
from tests.test_train_stacks import library, read_by_transformers

__all__ = ["library"]


@pytest.mark.parametrize("stack", ["awq,gptq_w4", "smoothquant_w8a8"])
def test_a_recipe_that_smooths_trains_and_exports(app_config: Any, library: str, tmp_path: Path, stack: str) -> None:
    cfg = app_config(f"+compress=[{stack}]", *TINY, library)
    app.train(cfg)
    folder = Path(cfg.paths.output_dir)
    rows = (folder / "report" / "modules.csv").read_text().splitlines()
    technique = "smoothquant" if "smoothquant" in stack else "awq"
    assert sum(f",{technique}," in row for row in rows) == 7  # every projection has its pair
    assert not [row for row in rows if "no smoothing pair" in row]
    bits = json.loads((folder / "compressed" / "config.json").read_text())["quantization_config"]["config_groups"]
    assert bits["group_0"]["weights"]["num_bits"] == (8 if technique == "smoothquant" else 4)

    read = read_by_transformers(folder / "compressed", tmp_path / "read.pt")
    compressed = LlamaDemo.load_from_checkpoint(folder / "compressed.ckpt", weights_only=True).eval()
    with torch.no_grad():
        ours = compressed(torch.arange(16)[None])
    tolerance = 0.1 if technique == "smoothquant" else 1e-4  # the .ckpt holds dense activations
    torch.testing.assert_close(read["logits"], ours, rtol=tolerance, atol=tolerance)
