"""One small real model of each kind, compressed by the recipes that docs/choosing.md names for it.

    make bench-choosing                             # or: python benchmarks/bench_choosing.py --help

Recipes run as they are in conf/compress, by name. Every figure is one of the exported folder, loaded into a new model:
its quality beside that of the dense model, the bytes of its tensors, and the CPU time of a forward pass relative to the
dense model, in alternating runs (one thread).
"""

import argparse
import contextlib
import io
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import machine
import torch
from choosing_models import CASES, Case, Predict, fit, output
from torch import nn

from lightning_compress import CompressionCallback, compress, load, save
from lightning_compress.recipe import load_recipe


@dataclass(frozen=True)
class Way:
    """A row: a recipe, and how the result runs.

    Args:
        recipes: Names of recipes, in order.
        dtype: That of the loaded model.
        epochs: Epochs of training, for recipes that train.
        targets: Replace those of the recipe.
        onnx: Export as ONNX and run in ONNX Runtime, the dense model, too.
    """

    recipes: tuple[str, ...]
    dtype: torch.dtype | None = None
    epochs: int = 0
    targets: tuple[str, ...] = ()
    onnx: bool = False

    def __str__(self) -> str:
        names = self.recipes[0] if len(self.recipes) == 1 else f"[{','.join(self.recipes)}]"
        targets = f", targets=[{','.join(self.targets)}]" if self.targets else ""
        loaded = ", loaded in bfloat16" if self.dtype is torch.bfloat16 else ""
        return names + targets + loaded + (", in ONNX Runtime" if self.onnx else "")


WAYS: dict[str, list[Way]] = {
    "language model": [
        Way(("w8a8",)),
        Way(("gptq_w4",)),
        Way(("gptq_w4",), dtype=torch.bfloat16),
        Way(("smoothquant", "gptq_w8a8")),
    ],
    "encoder": [Way(("w8a8",)), Way(("smoothquant_w8a8",)), Way(("gptq_w4",))],
    "vision transformer": [Way(("w8a8",)), Way(("gptq_w4",)), Way(("int8_static",), onnx=True)],
    "convolutional net": [Way(("int8_static",), onnx=True), Way(("distill", "structured_25"), epochs=20)],
    "recurrent net": [Way(("rtn_w8",), targets=("Linear", "LSTM")), Way(("gptq_w4",), targets=("Linear", "LSTM"))],
    "tabular net": [Way(("w8a8",)), Way(("int8_static",), onnx=True), Way(("distill", "structured_25"), epochs=20)],
    "speech": [Way(("int8_static",), onnx=True), Way(("w8a8",))],
}


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    results = earlier(arguments)
    for kind in arguments.only or CASES:
        case = CASES[kind](arguments.material)
        rows = results[kind] = [{"way": "dense", "bytes": size(case.model), **case.score(output(case.model))}]
        print(kind, json.dumps(rows[0]), flush=True)
        for way in WAYS[kind]:
            rows.append(measure(case, way))
            print(kind, json.dumps(rows[-1]), flush=True)
    publish(results, arguments)


def earlier(arguments: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Rows of an earlier run of this month, whose kinds this run may replace."""
    files = [] if arguments.dry else sorted(machine.RESULTS.glob(f"choosing_{machine.slug()}_*.json"))
    rows: dict[str, list[dict[str, Any]]] = json.loads(files[-1].read_text())["rows"] if files else {}
    return rows


def measure(case: Case, way: Way) -> dict[str, Any]:
    """The figures of one row."""
    modifiers = [modifier for name in way.recipes for modifier in load_recipe(name)]
    if way.targets:
        modifiers = [type(m)(**{**m.model_dump(exclude_unset=True), "targets": list(way.targets)}) for m in modifiers]
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        folder = Path(name) / "compressed"
        began = time.process_time()
        if way.epochs:
            assert case.train is not None
            callback = CompressionCallback(modifiers, evaluate=False, load_best=False)
            model = fit(case.fresh(), case.train, way.epochs, callback, folder=name)
        else:
            compress(model := case.fresh(), modifiers, case.batches)
            save(model, folder)
        seconds = time.process_time() - began
        if way.onnx:
            file, dense_file = (
                onnx_file(m, Path(name) / n, case) for m, n in ((model, "onnx"), (case.fresh(), "dense"))
            )
            predict, dense, stored = session(file), session(dense_file), file.stat().st_size
        else:
            fresh = case.fresh().to(way.dtype) if way.dtype else case.fresh()
            predict, dense = output(load(folder, fresh)), output(case.model)
            stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        speed = {"CPU time of dense": ratio(predict, dense, case.example)}
        return {"way": str(way), "bytes": stored, **case.score(predict), **speed, "seconds": seconds}


def onnx_file(model: nn.Module, folder: Path, case: Case) -> Path:
    return save(model, folder, format="onnx", sample=case.example) / "model.onnx"


def session(file: Path) -> Predict:
    """Predict in ONNX Runtime, on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    runtime = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name = runtime.get_inputs()[0].name
    return lambda x: torch.from_numpy(runtime.run(None, {name: x.numpy()})[0])


def size(model: nn.Module) -> int:
    """Bytes of all tensors, those that are shared counted once."""
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def ratio(predict: Predict, dense: Predict, x: Any) -> float:
    """CPU time of a forward pass over that of the dense model: the median of alternating pairs."""
    return median(cpu_seconds(predict, x) / cpu_seconds(dense, x) for _ in range(9))


def cpu_seconds(predict: Predict, x: Any, at_least: float = 0.1) -> float:
    """Of one call, over as many calls as take ``at_least`` seconds."""
    calls, began = 0, time.process_time()
    while (seconds := time.process_time() - began) < at_least or not calls:
        predict(x)
        calls += 1
    return seconds / calls


def publish(results: Mapping[str, Sequence[Mapping[str, Any]]], arguments: argparse.Namespace) -> None:
    """Print the table, and write it unless it is a dry run."""
    rows = []
    for kind, figures in results.items():
        for row in figures:
            quality = ", ".join(
                f"{name} {value:.4g}"
                for name, value in row.items()
                if name not in ("way", "bytes", "CPU time of dense", "seconds")
            )
            speed = f"{row['CPU time of dense']:.2f}" if "CPU time of dense" in row else "1"
            rows.append([kind, row["way"], quality, f"{row['bytes'] / 1e6:.3g}", speed, f"{row.get('seconds', 0):.0f}"])
    lines = machine.table(["kind", "recipe", "quality", "MB", "CPU time, dense = 1", "CPU s to compress"], rows)
    print("\n".join(lines))
    if not arguments.dry:
        print("written:", machine.write("choosing", "A recipe for each kind of model", lines, {"rows": results}))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--material", type=Path, default=Path("benchmarks/work"), help="folder of models and texts")
    parser.add_argument("--only", nargs="*", choices=sorted(CASES), help="kinds of models")
    parser.add_argument("--dry", action="store_true", help="print only, write no result")
    return parser.parse_args()


if __name__ == "__main__":
    main()
