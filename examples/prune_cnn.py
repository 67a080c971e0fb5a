"""Prune a convolutional network to 90 % zeros: at once after training, and on a schedule during further training.

    python -m examples.prune_cnn

Prints the accuracy before and after, that of the dense model after as many steps, and the share of zeros.
15 seconds on one CPU core.
"""

import argparse
import copy
import tempfile
from collections.abc import Sequence
from typing import Any

import lightning
from torch import nn

from examples.data_shapes import CLASSES, Shapes
from examples.image_classifier import ConvNet, ImageClassifier
from examples.quiet import quiet_trainer
from lightning_compress import CompressionCallback, MagnitudePruningModifier, compress


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train, prune in both ways; print and return accuracies and the share of zeros in per cent."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6, help="epochs of dense training, and again of pruning")
    parser.add_argument("--width", type=int, default=16, help="channels of the first convolution")
    parser.add_argument("--images", type=int, default=4000, help="training images")
    parser.add_argument("--sparsity", type=float, default=0.9, help="share of weights to remove, in [0, 1)")
    parser.add_argument("--out", default=None, help="an empty folder for the results; by default a temporary one")
    chosen = parser.parse_args(arguments)
    folder = chosen.out or tempfile.mkdtemp(prefix="prune_cnn_")

    lightning.seed_everything(0, verbose=False)
    data = Shapes(train_images=chosen.images)
    module = ImageClassifier(ConvNet(chosen.width, CLASSES))
    trainer = quiet_trainer(folder, epochs=chosen.epochs)
    trainer.fit(module, data)
    numbers = {"dense": accuracy(trainer, module, data)}

    pruned = copy.deepcopy(module)
    compress(pruned.model, MagnitudePruningModifier(start=None, **what(chosen.sparsity)))
    numbers["pruned at once"] = accuracy(quiet_trainer(folder), pruned, data)

    longer = copy.deepcopy(module)
    trainer = quiet_trainer(folder, epochs=chosen.epochs)
    trainer.fit(longer, data)
    numbers["dense, trained on"] = accuracy(trainer, longer, data)

    schedule = MagnitudePruningModifier(schedule="cubic", unit="fraction", start=0.0, end=0.6, **what(chosen.sparsity))
    trainer = quiet_trainer(folder, CompressionCallback(schedule), epochs=chosen.epochs)
    trainer.fit(module, data)  # the same module continues to train, now with the schedule
    numbers["pruned on a schedule"] = accuracy(trainer, module, data)
    numbers["zeros"] = 100 * zeros(module.model)

    for name, value in numbers.items():
        print(f"{name:22} {value:6.2f} %")
    print(f"the sparse model and the report are in {folder}")
    return numbers


def what(sparsity: float) -> dict[str, Any]:
    """All weights except the first convolution and the head: 2 % of all weights, and the most sensitive ones."""
    return {"targets": ["Conv2d"], "ignore": ["stage1.0"], "final_sparsity": sparsity}


def accuracy(trainer: lightning.Trainer, module: ImageClassifier, data: Shapes) -> float:
    """Accuracy in per cent on the validation set."""
    (found,) = trainer.validate(module, data, verbose=False)
    return found["val/accuracy"]


def zeros(model: nn.Module) -> float:
    """The share of zeros in the pruned weights."""
    weights = [model.get_parameter(name) for name in ("stage2.0.weight", "stage3.0.weight")]
    return float(sum((w == 0).sum() for w in weights)) / sum(w.numel() for w in weights)


if __name__ == "__main__":
    main()
