"""ONNX Runtime on a convolutional net: dense, static int8 by this package, and by ONNX Runtime's own quantizer.

    make bench-onnx                               # or: python benchmarks/bench_onnx.py --help

The net and digits of bench_vision.py. Each file is run on 397 test images at once, on one thread; candidates alternate,
and the least CPU time of each counts. The accuracy is that in ONNX Runtime on all 600 test images.
"""

import argparse
import contextlib
import copy
import io
import logging
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import bench_vision
import machine
import numpy as np
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import nn
from torch.utils.data import TensorDataset

from lightning_compress import (
    FoldBatchNormModifier,
    GPTQModifier,
    Modifier,
    QATModifier,
    QuantizationModifier,
    compress,
    load,
    save,
)

GOAL = 1.8  # times as fast as dense
IMAGES = 397


class Reader(CalibrationDataReader):
    """Calibration batches for ONNX Runtime's quantizer."""

    def __init__(self, batches: list[Any]):
        self.batches = iter([{"input": batch.numpy()} for batch in batches])

    def get_next(self) -> Any:
        return next(self.batches, None)


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "root"):
        logging.getLogger(name).setLevel(logging.ERROR)
    train, test = bench_vision.digits()
    batches = list(train.tensors[0][:512].split(64))
    with tempfile.TemporaryDirectory() as work, contextlib.redirect_stdout(io.StringIO()):
        files = write_files(Path(work), train, batches, arguments.epochs)
        rows = measure(files, test, arguments.rounds)
    publish(rows, arguments)


def write_files(work: Path, train: TensorDataset, batches: list[Any], epochs: int) -> dict[str, Path]:
    """The file of each candidate."""
    dense = bench_vision.fit(bench_vision.convolutional, 0, epochs, [], train, work / "dense-run")
    sample, files = torch.cat(batches), {}

    def write(name: str, model: nn.Module) -> None:
        files[name] = save(model, work / name, format="onnx", sample=sample) / "model.onnx"

    write("dense", dense)
    groups = {"config_groups": bench_vision.INT8}
    steps: dict[str, Modifier] = {
        "int8 static, rounded": QuantizationModifier(**groups),
        "int8 static, GPTQ": GPTQModifier(**groups),
    }
    for name, step in steps.items():
        smaller = copy.deepcopy(dense)
        compress(smaller, [FoldBatchNormModifier(), step], batches)
        write(name, smaller)
    qat = [FoldBatchNormModifier(), QATModifier(**groups, unit="fraction", start=0.5, observe_until=0.9)]
    tuned = fit_from(dense, epochs // 2, qat, train, work / "qat-run")
    write("int8 static, QAT", load(work / "qat-run" / "compressed", tuned))
    quant_pre_process(files["dense"], work / "prepared.onnx")
    kinds = {"activation_type": QuantType.QInt8, "weight_type": QuantType.QInt8, "per_channel": True}
    name = "int8 static, ONNX Runtime's quantizer"
    files[name] = work / "theirs.onnx"
    quantize_static(work / "prepared.onnx", files[name], Reader(batches), **kinds)
    return files


def fit_from(dense: nn.Module, epochs: int, modifiers: list[Modifier], train: TensorDataset, folder: Path) -> nn.Module:
    """Train on from a model; a new model of the same layers, for ``load``."""
    bench_vision.fit(lambda: copy.deepcopy(dense), 0, epochs, modifiers, train, folder)
    return copy.deepcopy(dense)


def measure(files: dict[str, Path], test: TensorDataset, rounds: int) -> dict[str, dict[str, float]]:
    """Accuracy, bytes and milliseconds of each file."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    sessions = {name: onnxruntime.InferenceSession(str(file), options) for name, file in files.items()}
    images, labels = (tensor.numpy() for tensor in test.tensors)
    rows = {}
    for name, session in sessions.items():
        (logits,) = session.run(None, {"input": images})
        right = float(np.mean(logits.argmax(1) == labels))
        rows[name] = {"accuracy": 100 * right, "bytes": files[name].stat().st_size, "ms": float("inf")}
    for _ in range(rounds):
        for name, session in sessions.items():
            began = time.process_time()
            session.run(None, {"input": images[:IMAGES]})
            rows[name]["ms"] = min(rows[name]["ms"], 1e3 * (time.process_time() - began))
    return rows


def publish(rows: dict[str, dict[str, float]], arguments: argparse.Namespace) -> None:
    """Print the table, and write it unless it is a dry run."""
    dense = rows["dense"]["ms"]
    cells = [
        [name, f"{row['accuracy']:.2f}", f"{row['bytes']:,}", f"{row['ms']:.2f}", f"{dense / row['ms']:.2f}"]
        for name, row in rows.items()
    ]
    slowest = min(dense / row["ms"] for name, row in rows.items() if name.startswith("int8") and "ONNX" not in name)
    lines = [
        *machine.table(["file", "accuracy, %", "bytes", "CPU ms", "times as fast"], cells),
        "",
        f"- at least {GOAL:g} times as fast as dense: {'yes' if slowest >= GOAL else 'NO'} ({slowest:.2f}).",
        "",
        f"{IMAGES} images of 8 x 8 at once, one thread, ONNX Runtime {onnxruntime.__version__}, the least of "
        f"{arguments.rounds} alternating runs: `python benchmarks/bench_onnx.py --epochs {arguments.epochs}`. One test "
        f"image is 0.17 points, one seed.",
    ]
    print("\n".join(lines))
    if not arguments.dry:
        title = "Digits in ONNX Runtime: static int8 beside dense"
        print("written:", machine.write("onnx", title, lines, {"files": rows}, arguments.machine))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=60)
    machine.add_arguments(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
