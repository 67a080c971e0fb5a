"""Vision: int8 quantization-aware training, 90 % of weights pruned, and compression after training, of two small nets.

    make bench-vision                               # or: python benchmarks/bench_vision.py --help

scikit-learn's digits (1,797 images of 8 x 8, 10 classes): 1,197 train, 600 test, one split for all. Every arm is one
`Trainer.fit` of as many epochs from the same initial weights; compression happens inside of it, by
`CompressionCallback`. For comparison, without training: the float model of that seed rounded to nearest, and
pruned at once. The accuracy is that of the exported folder, loaded into a new model.

After training (`--arms after`, without the arms that train): GPTQ at 4 and 3 bits of all layers, and SparseGPT 2:4 of
all but the first, which has few columns; each alone and with TuneModifier, on the training images without their labels.
"""

import argparse
import contextlib
import copy
import io
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import lightning
import machine
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import (
    CompressionCallback,
    GPTQModifier,
    MagnitudePruningModifier,
    Modifier,
    QATModifier,
    QuantizationModifier,
    SparseGPTModifier,
    TuneModifier,
    compress,
    load,
)

LAYERS = ["Linear", "Conv2d"]
LIMITS = {"int8 QAT": 0.5, "90 % sparse": 1.0, "W4, tune": 0.5, "W3, tune": 0.5, "2:4, tune": 0.5}
"""Points of accuracy below float, at most."""
TUNE: dict[str, Any] = {"epochs": 16, "lr": 3e-3, "patience": 3}
INT8: dict[str, Any] = {
    "all": {
        "targets": LAYERS,
        "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
        "input_activations": {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "tensor", "dynamic": False},
    }
}


def convolutional() -> nn.Module:
    """Three 3 x 3 convolutions with BatchNorm, 94,000 parameters."""

    def stage(inputs: int, outputs: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *stage(1, 32),
        *stage(32, 64),
        nn.MaxPool2d(2),
        *stage(64, 128),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


class Attention(nn.Module):
    """Self-attention over all patches; q, k and v in one Linear."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed: Tensor = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A transformer block, norms first."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.before, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.between = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before(x))
        return x + self.mlp(self.between(x))


class VisionTransformer(nn.Module):
    """16 patches of 2 x 2, four blocks of width 64, mean over patches; 136,000 parameters."""

    def __init__(self, width: int = 64, depth: int = 4, heads: int = 4):
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.place = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        patches = x.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4).flatten(1, 3)
        return self.head(self.norm(self.blocks(self.embed(patches) + self.place)).mean(1))


MODELS: dict[str, Callable[[], nn.Module]] = {"convolutional net": convolutional, "ViT": VisionTransformer}


class Classifier(lightning.LightningModule):
    """Cross-entropy, AdamW, one cycle of the learning rate."""

    def __init__(self, model: nn.Module, lr: float = 3e-3):
        super().__init__()
        self.model, self.lr = model, lr

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.model(x), y, label_smoothing=0.1)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.05)
        steps = int(self.trainer.estimated_stepping_batches)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}


def arms() -> dict[str, list[Modifier]]:
    """What each arm trains with."""
    sparse = MagnitudePruningModifier(
        targets=LAYERS, final_sparsity=0.9, schedule="cubic", unit="fraction", start=0.1, end=0.6, update=0.01
    )
    return {
        "float": [],
        "int8 QAT": [QATModifier(config_groups=INT8, unit="fraction", start=0.5, observe_until=0.9, freeze_bn_at=0.9)],
        "90 % sparse": [sparse],
    }


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    train, test = digits()
    found: dict[str, dict[str, list[float]]] = {}
    seconds: dict[str, dict[str, list[float]]] = {}
    for name, make in MODELS.items():
        for seed in range(arguments.seeds):
            results = one_seed(make, seed, arguments.epochs, train, test, arguments.arms)
            for arm, (accuracy, took) in results.items():
                found.setdefault(name, {}).setdefault(arm, []).append(accuracy)
                seconds.setdefault(name, {}).setdefault(arm, []).append(took)
                print(f"{name}, seed {seed}, {arm}: {accuracy:.2f} %, {took:.1f} s", flush=True)
    publish(found, seconds, arguments)


def one_seed(
    make: Callable[[], nn.Module], seed: int, epochs: int, train: TensorDataset, test: TensorDataset, which: str
) -> dict[str, tuple[float, float]]:
    """Accuracy in percent and seconds of every arm."""
    results = {}
    for arm, modifiers in arms().items() if which != "after" else [("float", [])]:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            began = time.perf_counter()
            model = fit(make, seed, epochs, modifiers, train, Path(folder))
            took = time.perf_counter() - began
            if modifiers:
                model = load(Path(folder) / "compressed", make())
        results[arm] = (accuracy(model, test), took)
        if arm == "float":
            results |= untrained(model, train, test) if which != "after" else {}
            results |= after_training(model, train, test) if which != "training" else {}
    return results


def untrained(model: nn.Module, train: TensorDataset, test: TensorDataset) -> dict[str, tuple[float, float]]:
    """The float model, compressed without training."""
    batches = [batch[0] for batch, _ in zip(DataLoader(train, 128), range(4), strict=False)]
    once: dict[str, Modifier] = {
        "int8, rounded": QuantizationModifier(config_groups=INT8),
        "90 % at once": MagnitudePruningModifier(targets=LAYERS, final_sparsity=0.9),
    }
    results = {}
    for arm, modifier in once.items():
        began, smaller = time.perf_counter(), copy.deepcopy(model)
        compress(smaller, modifier, batches)
        results[arm] = (accuracy(smaller, test), time.perf_counter() - began)
    return results


def after_training(model: nn.Module, train: TensorDataset, test: TensorDataset) -> dict[str, tuple[float, float]]:
    """The float model, compressed on the training images."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    batches = list(train.tensors[0][order].split(64))
    groups = {"targets": LAYERS, "group_size": [64, 32, -1]}
    first = next(name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d))
    steps: dict[str, Callable[[], Modifier]] = {
        "W4": lambda: GPTQModifier(scheme="W4A16", **groups),
        "W3": lambda: GPTQModifier(scheme="W3A16", **groups),
        "2:4": lambda: SparseGPTModifier(targets=LAYERS, mask_structure="2:4", ignore=[first]),
    }
    results = {}
    for arm, step in steps.items():
        for tune in ([], [TuneModifier(**TUNE, sparse_weights=arm == "2:4")]):
            began, smaller = time.perf_counter(), copy.deepcopy(model)
            compress(smaller, [step(), *tune], batches)
            results[arm + ", tune" * len(tune)] = (accuracy(smaller, test), time.perf_counter() - began)
    return results


def fit(
    make: Callable[[], nn.Module],
    seed: int,
    epochs: int,
    modifiers: Sequence[Modifier],
    train: TensorDataset,
    folder: Path,
) -> nn.Module:
    """One run; the model as it is in the end, in eval mode."""
    lightning.seed_everything(seed, verbose=False)
    module = Classifier(make())
    callback = [CompressionCallback(list(modifiers), evaluate=False)] if modifiers else []
    trainer = lightning.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        callbacks=callback,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    order = torch.Generator().manual_seed(seed)
    trainer.fit(module, DataLoader(train, 64, shuffle=True, drop_last=True, generator=order))
    return module.model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, test: TensorDataset) -> float:
    """Percent of the test images."""
    x, y = test.tensors
    return float((model.eval()(x).argmax(1) == y).float().mean() * 100)


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Images [N, 1, 8, 8] in [-1, 1] and labels [N]: two thirds to train on, the rest to test on."""
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    y = torch.tensor(data.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return TensorDataset(x[order[:-600]], y[order[:-600]]), TensorDataset(x[order[-600:]], y[order[-600:]])


def publish(
    found: dict[str, dict[str, list[float]]], seconds: dict[str, dict[str, list[float]]], arguments: argparse.Namespace
) -> None:
    """Print the table, and write it unless it is a dry run."""
    rows, told = [], []
    for name, by_arm in found.items():
        for arm, values in by_arm.items():
            gaps = [value - dense for value, dense in zip(values, by_arm["float"], strict=True)]
            gap, error = mean(gaps), standard_error(gaps)
            each = ", ".join(f"{value:.2f}" for value in values)
            measured = [f"{mean(values):.2f} ± {standard_error(values):.2f}", each, f"{gap:+.2f} ± {error:.2f}"]
            measured.append(f"{mean(seconds[name][arm]):.1f}")
            rows.append([name, arm, *measured])
            if arm in LIMITS:
                kept = "yes" if gap >= -LIMITS[arm] else "NO"
                told.append(f"- {name}, {arm}: within {LIMITS[arm]:g} points of float: {kept} ({gap:+.2f}).")
    how = {
        "training": "Int8: weights per row, activations per tensor, all layers. Sparse: all layers, cubic schedule.",
        "after": f"After training: groups of 64, 32 or one row, 19 batches of 64 images, TuneModifier with {TUNE} "
        "(2:4: `sparse_weights` too).",
    }
    lines = [
        *machine.table(["model", "arm", "accuracy, %", "seeds", "to float, points", "s"], rows),
        "",
        *told,
        "",
        f"Mean and standard error over {arguments.seeds} seeds, {arguments.epochs} epochs each, one thread: `python "
        f"benchmarks/bench_vision.py --arms {arguments.arms} --seeds {arguments.seeds} --epochs {arguments.epochs}`. "
        "One test image is 0.17 points. "
        + " ".join(text for key, text in how.items() if arguments.arms in (key, "all")),
    ]
    print("\n".join(lines))
    if not arguments.dry:
        facts = {"accuracy": found, "seconds": seconds, "epochs": arguments.epochs}
        titles = {"training": "int8 QAT and 90 % sparsity", "after": "4 and 3 bits and 2:4 after training"}
        title = f"Digits: {titles.get(arguments.arms, ', '.join(titles.values()))} beside float"
        what = "vision" if arguments.arms == "all" else f"vision-{arguments.arms}"
        print("written:", machine.write(what, title, lines, facts, arguments.machine))


def standard_error(values: Sequence[float]) -> float:
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--arms", choices=["all", "training", "after"], default="all", help="which to run beside float")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=60)
    machine.add_arguments(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
