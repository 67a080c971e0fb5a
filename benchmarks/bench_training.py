"""Benefit of training: quantization-aware training and pruning schedules against one-shot, on the demo's model.

    make bench-training                             # or: python benchmarks/bench_training.py --help

For each seed the model of `make demo` is trained once. From there, on the same text:

- at W4, W3 and W2 in groups of 64: rounding, GPTQ, QAT that starts from GPTQ's result, and QAT with distillation from
  the dense model that starts there too; both trained rows see the same tokens;
- at 50 %, 2:4 and 80 % zeros: magnitude in one shot, along the cubic schedule, and that with distillation;
- the dense model trained further on as many tokens: the effect of the tokens alone. The demo's model is not converged,
  so a loss below the dense one is not an effect of compression: compressed models are compared by KL to the dense one.

All trained rows go through an ordinary Trainer with a CompressionCallback. Rows of an earlier call are read from
--out, so that a run of an hour can be interrupted, or divided between two processes with --rows.
"""

import argparse
import copy
import shutil
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import machine
import torch
from demo_model import Scores, demo_config, load, measure, train_once
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn

from lightning_compress import (
    CompressionCallback,
    DistillationModifier,
    GPTQModifier,
    MagnitudePruningModifier,
    Modifier,
    QATModifier,
    QuantizationModifier,
    compress,
)

HEAD = ["re:.*lm_head"]
# Peak learning rates: the finer the grid, the closer GPTQ's result is to the dense model, and the smaller must steps be
# that do not lead away from it (seed 42, W3 distilled, loss - dense: .00017 at 1.5e-5, .00030 at 3e-5, GPTQ .00060).
LR = {"W4": 1e-5, "W3": 2e-5, "W2": 1e-4, "sparse": 5e-4, "dense": 5e-4}


@dataclass(frozen=True)
class Material:
    """What all rows of a seed share.

    Args:
        config: Of the demo, with the text and the model.
        dense: The trained LightningModule.
        calibration: Batches of the calibration split.
        held_out: Token blocks of the test split, int64 [B, T] each.
        folder: Where runs write.
        steps: Training steps of a trained row.
    """

    config: DictConfig
    dense: Any
    calibration: list[Any]
    held_out: list[Tensor]
    folder: Path
    steps: int

    def copy(self) -> Any:
        return copy.deepcopy(self.dense)


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    rows = [row for row in TABLE if not arguments.rows or any(word in row.name for word in arguments.rows)]
    measured: dict[str, dict[int, Scores]] = {row.name: {} for row in rows}
    for seed in arguments.seeds:
        material = prepare(seed, arguments)
        for row in rows:
            scores = measured[row.name][seed] = once(row, seed, material, arguments.out / str(seed) / "scores")
            print(seed, row.name, f"ppl {scores.losses.mean().exp():.4f}  KL {scores.kl.mean():.6f}", flush=True)
    lines = report(measured, arguments)
    print("\n".join(lines))
    if not arguments.dry:
        facts = {
            name: {str(seed): {"loss": float(s.losses.mean()), "kl": float(s.kl.mean())} for seed, s in by_seed.items()}
            for name, by_seed in measured.items()
        }
        title = "Compression while training, on the demo's model"
        print("written:", machine.write("training", title, lines, {"rows": facts}, arguments.machine))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/work/training"), help="where training writes")
    parser.add_argument("--blocks", type=int, default=1024, help="held-out blocks, spread over the test text")
    parser.add_argument("--steps", type=int, default=250, help="training steps of each trained row")
    parser.add_argument("--calibration-batches", type=int, default=16)
    parser.add_argument("--rows", nargs="*", help="only rows whose name holds one of these words")
    machine.add_arguments(parser)
    return parser.parse_args()


def prepare(seed: int, arguments: argparse.Namespace) -> Material:
    """The dense model of a seed, trained unless an earlier call has, and the text."""
    folder = arguments.out / str(seed)
    config = demo_config(folder / "dense", f"seed={seed}", f"data.test_blocks={arguments.blocks}")
    dense = load(config, train_once(config))
    data = instantiate(config.data)
    data.setup("test")
    calibration = list(data.calibration_dataloader())[: arguments.calibration_batches]
    held_out = [batch["input_ids"] for batch in data.test_dataloader()]
    return Material(config, dense, calibration, held_out, folder / "runs", arguments.steps)


def once(row: "Row", seed: int, material: Material, folder: Path) -> Scores:
    """The scores of a row, measured unless an earlier call has."""
    kept = folder / f"{row.name.replace(' ', '_').replace('%', 'pct').replace(':', 'of')}.pt"
    if kept.exists():
        return Scores(*torch.load(kept, weights_only=True))
    lightning.seed_everything(seed, verbose=False)
    scores = measure(row.build(material), material.dense.model, material.held_out)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save((scores.losses, scores.kl), kept)
    return scores


# -- one row -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Args:
        table: Rows that stand together.
        name: What was done.
        build: Makes the compressed model.
    """

    table: str
    name: str
    build: Callable[[Material], nn.Module]


def scheme(bits: int) -> dict[str, Any]:
    """Symmetric integers in groups of 64; the output layer stays dense, as in the recipes."""
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": HEAD}


def one_shot(make: Callable[[], Modifier]) -> Callable[[Material], nn.Module]:
    def build(material: Material) -> nn.Module:
        model: nn.Module = material.copy().model
        compress(model, make(), material.calibration)
        return model

    return build


def trained(
    make: Callable[[Material], dict[str, Modifier]], lr: float, start: Modifier | None = None
) -> Callable[[Material], nn.Module]:
    """Train a copy under modifiers with peak learning rate ``lr``, after a one-shot ``start`` where there is one."""

    def build(material: Material) -> nn.Module:
        module = material.copy().train()
        if start is not None:
            compress(module.model, start.model_copy(deep=True), material.calibration)
        modifiers = make(material)
        fit(module, material, lr, [CompressionCallback(modifiers, evaluate=False)] if modifiers else [])
        model: nn.Module = module.model
        return model

    return build


def fit(module: Any, material: Material, lr: float, callbacks: list[Any]) -> None:
    """Train on for ``material.steps`` steps; the run's folder is removed afterwards."""
    data = instantiate(material.config.data, train_blocks=material.steps * material.config.data.batch_size)
    module.lr, module.weight_decay = lr, 0.0
    material.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=material.folder))
    trainer = lightning.Trainer(
        default_root_dir=str(folder), max_epochs=1, accelerator="cpu", callbacks=callbacks, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0,
        limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, data)
    shutil.rmtree(folder, ignore_errors=True)


def distillation(material: Material) -> DistillationModifier:
    return DistillationModifier(teacher=material.copy().model, weight=1.0)


def qat(bits: int) -> QATModifier:
    return QATModifier(**scheme(bits))


def pruning(pattern: str, *, scheduled: bool) -> MagnitudePruningModifier:
    """Magnitude at 50 %, 2:4 or 80 %; scheduled: cubic over the first three quarters of the run."""
    window: dict[str, Any] = {"start": 0.0, "end": 0.75, "update": 0.02, "unit": "fraction"} if scheduled else {}
    share = {"2:4": 0.5, "50 %": 0.5, "80 %": 0.8}[pattern]
    structure = pattern if ":" in pattern else "unstructured"
    return MagnitudePruningModifier(ignore=HEAD, final_sparsity=share, mask_structure=structure, **window)


def table() -> list[Row]:
    rows = [
        Row("dense", "dense", lambda m: m.copy().model),
        Row("dense", "dense, trained on", trained(lambda m: {}, LR["dense"])),
    ]
    for b in (4, 3, 2):
        rows += [
            Row(f"W{b}", f"W{b} RTN", one_shot(lambda b=b: QuantizationModifier(**scheme(b)))),
            Row(f"W{b}", f"W{b} GPTQ", one_shot(lambda b=b: GPTQModifier(**scheme(b)))),
            Row(f"W{b}", f"W{b} QAT", trained(lambda m, b=b: {"qat": qat(b)}, LR[f"W{b}"], gptq(b))),
            Row(
                f"W{b}", f"W{b} QAT + distillation",
                trained(lambda m, b=b: {"distill": distillation(m), "qat": qat(b)}, LR[f"W{b}"], gptq(b)),
            ),
        ]  # fmt: skip
    for p in ("50 %", "2:4", "80 %"):
        rows += [
            Row(p, f"{p} one-shot", one_shot(lambda p=p: pruning(p, scheduled=False))),
            Row(p, f"{p} cubic", trained(lambda m, p=p: {"prune": pruning(p, scheduled=True)}, LR["sparse"])),
            Row(
                p, f"{p} cubic + distillation",
                trained(
                    lambda m, p=p: {"distill": distillation(m), "prune": pruning(p, scheduled=True)}, LR["sparse"]
                ),
            ),
        ]  # fmt: skip
    return rows


def gptq(bits: int) -> GPTQModifier:
    return GPTQModifier(**scheme(bits), keep_latents=True)


TABLE = table()


# -- the report --------------------------------------------------------------------------------------------------------


def report(measured: dict[str, dict[int, Scores]], arguments: argparse.Namespace) -> list[str]:
    """The table as Markdown: mean and spread over seeds, and how much of GPTQ's gap to the dense model is gone.

    Rows that learn from the text alone surpass a dense model that has not converged, so no gap is computed for them.
    """
    names = {row.name: row.table for row in TABLE}
    dense = measured.get("dense", {})
    rows = []
    for name, scores in measured.items():
        seeds = list(scores)
        trained_from = measured.get(f"{names[name]} GPTQ", {}) if "QAT + " in name else {}
        gaps = {seed: _gap(scores[seed], dense[seed]) for seed in seeds if dense}
        left = {seed: _gap(start, dense[seed]) for seed, start in trained_from.items() if dense}
        rows.append([
            name,
            spread([float(scores[seed].losses.mean().exp()) for seed in seeds], ".4f"),
            spread([gaps[seed] for seed in gaps], "+.5f"),
            spread([float(scores[seed].kl.mean()) for seed in seeds], ".6f"),
            spread([1 - gaps[seed] / left[seed] for seed in left], ".2f"),
            spread([1 - float(scores[s].kl.mean() / trained_from[s].kl.mean()) for s in trained_from], ".2f"),
        ])  # fmt: skip
    head = ["", "perplexity", "loss - dense, nats per token", "KL to dense", "of GPTQ's loss, gone", "of its KL, gone"]
    return [
        *machine.table(head, rows),
        "",
        f"Mean ± standard deviation over the seeds {', '.join(map(str, arguments.seeds))}. Trained rows: "
        f"{arguments.steps} steps of 16 x 128 tokens, AdamW, no weight decay, peak learning rates "
        f"{', '.join(f'{rows} {lr:g}' for rows, lr in LR.items())}; `lm_head` stays dense. "
        f"{arguments.blocks * 127:,} held-out tokens. PyTorch {torch.__version__}, Lightning {lightning.__version__}.",
    ]


def _gap(scores: Scores, dense: Scores) -> float:
    return float((scores.losses - dense.losses).mean())


def spread(values: list[float], form: str) -> str:
    if not values:
        return ""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{form}} ± {deviation:{form.lstrip('+')}}"


if __name__ == "__main__":
    main()
