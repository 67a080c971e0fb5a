"""Stacks of recipes from one command line: prune, distil, quantize, export; plain transformers reads what came out."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback

import train as app
from examples.model_llama import LlamaDemo
from tests.test_train import TINY

READ = """
import sys
sys.modules["lightning_compress"] = None                       # whatever would import it fails
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
with torch.no_grad():
    logits = model(input_ids=torch.arange(16)[None]).logits
torch.save({"logits": logits, "weights": {n: p.data for n, p in model.named_parameters()}}, sys.argv[2])
"""


@pytest.fixture
def library(tmp_path: Path) -> str:
    folder = tmp_path / "library"
    folder.mkdir()
    for i in range(60):
        (folder / f"module_{i}.py").write_text(f"def f_{i}(x):\n    return [x * {i}, {i * i}]\n" * 20)
    return f"+data.folder={folder}"


def read_by_transformers(folder: Path, out: Path) -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    run = [sys.executable, "-c", READ, str(folder), str(out)]
    done = subprocess.run(run, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=True)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("stack", "types"),
    [
        (["prune_2of4", "distill", "gptq_w4"], ["Magnitude", "Distillation", "GPTQ"]),
        (["distill_midway", "prune_2of4", "qat_w4"], ["Distillation", "Magnitude", "QAT"]),
    ],
    ids=["prune_distil_gptq", "distil_midway_prune_qat"],
)
def test_a_stack_trains_exports_and_keeps_its_zeros(
    app_config: Any, library: str, tmp_path: Path, stack: list[str], types: list[str]
) -> None:
    cfg = app_config(f"+compress=[{','.join(stack)}]", *TINY, library)
    metrics = app.train(cfg)
    folder = Path(cfg.paths.output_dir)
    recipe = yaml.safe_load((folder / "compressed" / "recipe.yaml").read_text())
    assert [m["type"].removesuffix("Modifier").removesuffix("Pruning") for m in recipe["modifiers"].values()] == types
    config = json.loads((folder / "compressed" / "config.json").read_text())
    assert config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] == 4

    read = read_by_transformers(folder / "compressed", tmp_path / "read.pt")
    linears = {n: w for n, w in read["weights"].items() if n.endswith("_proj.weight")}
    assert len(linears) == 7
    for name, weight in linears.items():
        kept = weight != 0
        assert (kept.view(len(weight), -1, 4).sum(-1) <= 2).all(), name
        assert max(len(row.unique()) for row in weight) <= 16, name  # 4 bits in one group of 128

    compressed = LlamaDemo.load_from_checkpoint(folder / "compressed.ckpt", weights_only=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(read["logits"], compressed(torch.arange(16)[None]), rtol=1e-4, atol=1e-4)
    assert metrics["test/loss"] > 0
    assert not any("teacher" in key for key in torch.load(folder / "compressed.ckpt", weights_only=True)["state_dict"])


class Kill(Callback):
    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == 3:
            raise KeyError("power cut")


def test_a_teacher_copied_from_the_first_weights_is_the_same_one_on_resume(
    app_config: Any, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The app seeds before it builds the model, so the copy is that of the first run; another seed is refused."""
    keep = ["+callbacks.model_checkpoint.every_n_train_steps=2", "callbacks.model_checkpoint.monitor=null"]
    cfg = app_config("+compress=distill", *TINY, library, *keep)
    build = app.instantiate_each
    with monkeypatch.context() as patch:
        patch.setattr(app, "instantiate_each", lambda c, kind: build(c, kind) + [Kill()] * (kind is Callback))
        with pytest.raises(KeyError, match="power cut"):
            app.train(cfg)
    last = Path(cfg.paths.output_dir) / "checkpoints" / "last.ckpt"
    resumed = app_config("+compress=distill", *TINY, library, *keep, f"ckpt_path={last}")
    assert "train/loss" in app.train(resumed)
    other = app_config("+compress=distill", *TINY, library, *keep, f"ckpt_path={last}", "seed=7")
    with pytest.raises(ValueError, match="teacher='self' is the model as it is built, so build it with the same"):
        app.train(other)
