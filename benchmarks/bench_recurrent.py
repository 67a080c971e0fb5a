"""A recurrent net, smaller: the LSTM and GRU of a classifier at 8 and 4 bits, and half of their weights pruned.

    make bench-recurrent                            # or: python benchmarks/bench_recurrent.py --help

scikit-learn's digits as in bench_vision.py, each image a sequence of 8 rows of 8 pixels: two recurrent layers, and a
Linear. Every arm starts from the float model of its seed; those that train take a third of its epochs, and the
accuracy is that of the exported folder, loaded into a new model. Bytes are those of model.safetensors.
"""

import argparse
import contextlib
import copy
import io
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import machine
import torch
from bench_vision import accuracy, digits, fit, standard_error
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_compress import (
    GPTQModifier,
    MagnitudePruningModifier,
    Modifier,
    QATModifier,
    QuantizationModifier,
    compress,
    load,
    save,
)

TARGETS = ["Linear", "LSTM", "GRU"]


class Rows(nn.Module):
    """Reads an image row by row; 202,000 parameters as an LSTM."""

    def __init__(self, kind: type[nn.RNNBase]):
        super().__init__()
        self.body: Any = kind(8, 128, 2, batch_first=True)  # type: ignore[call-arg, arg-type]
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x.squeeze(1))[0][:, -1])
        return logits


def after_training() -> dict[str, Modifier | None]:
    """Arms that compress the float model."""
    every = {"targets": TARGETS}
    return {
        "float": None,
        "W8, rounded": QuantizationModifier(scheme="W8A16", group_size=-1, **every),
        "W4, rounded": QuantizationModifier(scheme="W4A16", group_size="auto", **every),
        "W4, GPTQ": GPTQModifier(scheme="W4A16", group_size="auto", **every),
        "W3, GPTQ": GPTQModifier(scheme="W3A16", group_size="auto", **every),
        "50 % at once": MagnitudePruningModifier(final_sparsity=0.5, **every),
    }


def in_training() -> dict[str, list[Modifier]]:
    """Arms that train on from the float model."""
    every = {"targets": TARGETS}
    window = {"unit": "fraction", "start": 0, "end": 0.5, "update": 0.05}
    return {
        "float, trained on": [],
        "W4, QAT": [QATModifier(scheme="W4A16", group_size="auto", **every)],
        "W3, QAT": [QATModifier(scheme="W3A16", group_size="auto", **every)],
        "50 %, trained": [MagnitudePruningModifier(final_sparsity=0.5, **window, **every)],
    }


def one_seed(
    make: Callable[[], nn.Module], seed: int, epochs: int, train: TensorDataset, test: TensorDataset
) -> dict[str, tuple[float, int]]:
    """Accuracy in percent and bytes on disk of every arm."""
    results = {}
    with tempfile.TemporaryDirectory() as root, contextlib.redirect_stdout(io.StringIO()):
        dense = fit(make, seed, epochs, [], train, Path(root))
        for number, (arm, modifier) in enumerate(after_training().items()):
            folder = Path(root) / f"after{number}"
            smaller = copy.deepcopy(dense)
            if modifier is not None:
                compress(smaller, modifier, list(train.tensors[0].split(64)))
            results[arm] = measured(save(smaller, folder), make(), test)
        for number, (arm, modifiers) in enumerate(in_training().items()):
            folder = Path(root) / f"in{number}"
            model = fit(lambda: copy.deepcopy(dense), seed, epochs // 3, modifiers, train, folder)
            exported = folder / "compressed" if modifiers else save(model, folder / "compressed")
            results[arm] = measured(exported, make(), test)
    return results


def measured(folder: Path, model: nn.Module, test: TensorDataset) -> tuple[float, int]:
    return accuracy(load(folder, model), test), (folder / "model.safetensors").stat().st_size


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    train, test = digits()
    rows: list[list[str]] = []
    facts: dict[str, Any] = {}
    for name, kind in {"LSTM": nn.LSTM, "GRU": nn.GRU}.items():
        each = [
            one_seed(lambda kind=kind: Rows(kind), s, arguments.epochs, train, test) for s in range(arguments.seeds)
        ]
        for arm in each[0]:
            values = [results[arm][0] for results in each]
            gaps = [results[arm][0] - results["float"][0] for results in each]
            size = each[0][arm][1]
            gap = f"{mean(gaps):+.2f} ± {standard_error(gaps):.2f}"
            rows.append([name, arm, f"{mean(values):.2f}", gap, f"{size:,}", f"{size / each[0]['float'][1]:.3f}"])
            facts.setdefault(name, {})[arm] = {"accuracy": values, "bytes": size}
            print(*rows[-1], flush=True)
    lines = [
        *machine.table(["model", "arm", "accuracy, %", "to float, points", "bytes", "of float"], rows),
        "",
        f"Mean and standard error over {arguments.seeds} seeds, {arguments.epochs} epochs, one thread. One test image "
        "is 0.17 points. W8 has a scale for each row, W4 and W3 for groups of 128 columns where they divide the row, "
        "else for each row.",
    ]
    print("\n".join(lines))
    if not arguments.dry:
        title = "Digits row by row: recurrent weights at 8, 4 and 3 bits, and half of them pruned"
        print("written:", machine.write("recurrent", title, lines, facts, arguments.machine))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=30)
    machine.add_arguments(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
