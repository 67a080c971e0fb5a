"""Distil a convolutional network into one of a quarter of its width, with a tenth of the labels.

    python -m examples.distill_narrow

The student learns from the teacher's logits and, through a learned projection, from its features. Prints the accuracy
of the teacher, and of the student trained without and with the teacher. 17 seconds on one CPU core.
"""

import argparse
import tempfile
from collections.abc import Sequence

import lightning

from examples.data_shapes import CLASSES, Shapes
from examples.image_classifier import ConvNet, ImageClassifier
from examples.prune_cnn import accuracy
from examples.quiet import quiet_trainer
from lightning_compress import CompressionCallback, DistillationModifier


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train the teacher once and the student twice; print and return accuracies in per cent."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6, help="epochs of the teacher; the student makes as many steps")
    parser.add_argument("--width", type=int, default=16, help="width of the teacher; the student has a quarter of it")
    parser.add_argument("--images", type=int, default=4000, help="training images; the student gets a tenth of them")
    parser.add_argument("--out", default=None, help="an empty folder for the results; by default a temporary one")
    chosen = parser.parse_args(arguments)
    folder = chosen.out or tempfile.mkdtemp(prefix="distill_narrow_")

    lightning.seed_everything(0, verbose=False)
    many, few = Shapes(train_images=chosen.images), Shapes(train_images=chosen.images // 10)
    teacher = ImageClassifier(ConvNet(chosen.width, CLASSES))
    trainer = quiet_trainer(folder, epochs=chosen.epochs)
    trainer.fit(teacher, many)
    numbers = {"teacher": accuracy(trainer, teacher, many)}

    distil = DistillationModifier(
        teacher=teacher.model,
        weight=0.9,
        temperature=2.0,
        hidden={"stage2": "stage2", "stage3": "stage3"},
        hidden_weight=0.1,
    )
    for name, callbacks in (("student alone", []), ("student, taught", [CompressionCallback(distil)])):
        lightning.seed_everything(1, verbose=False)
        student = ImageClassifier(ConvNet(chosen.width // 4, CLASSES))
        trainer = quiet_trainer(folder, *callbacks, epochs=10 * chosen.epochs)
        trainer.fit(student, few)
        numbers[name] = accuracy(trainer, student, few)

    for name, value in numbers.items():
        print(f"{name:16} {value:6.2f} %")
    print(f"the report is in {folder}")
    return numbers


if __name__ == "__main__":
    main()
