"""Accuracy of static int8: the recipes int8_static, gptq_int8_static and qat_int8_static beside float.

    make bench-static                               # or: python benchmarks/bench_static.py --help

Digits: the two nets, the split and the training of bench_vision.py. Each arm after training compresses the same float
model on 8 batches of 64 training images; `int8 QAT` trains as long as float. The error is that of the logits relative
to float, sum |y - y_float|^2 / sum |y_float|^2, over the test images. Bytes are those of a file that holds
codes and scales of quantized layers, and all else in float32.

MiniLM (with --material, the folder of `make bench-data`): cosine of each text's embedding to that of the dense model.
"""

import argparse
import contextlib
import copy
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import bench_vision
import machine
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_compress import Modifier, compress, load, save
from lightning_compress.quant.record import Quantized
from lightning_compress.recipe import load_recipe

Arm = Callable[[nn.Module], list[Modifier]]


def changed(recipe: str, **fields: Any) -> Arm:
    """The recipe with other arguments of its quantizer."""

    def make(model: nn.Module) -> list[Modifier]:
        *rest, quantizer = load_recipe(recipe)
        return [*rest, type(quantizer)(**{**quantizer.model_dump(exclude_unset=True), **fields})]

    return make


def without_ends(model: nn.Module) -> list[Modifier]:
    """int8_static without the first and the last layer."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    return changed("int8_static", ignore=[names[0], names[-1]])(model)


AFTER: dict[str, Arm] = {
    "int8_static": changed("int8_static"),
    "gptq_int8_static": changed("gptq_int8_static"),
    "int8_static, observer=mse": changed("int8_static", observer="mse"),
    "int8_static, observer=percentile": changed("int8_static", observer="percentile"),
    "int8_static, observer=histogram": changed("int8_static", observer="histogram"),
    "int8_static, scheme=INT8_STATIC_SYM": changed("int8_static", scheme="INT8_STATIC_SYM"),
    "int8_static, first and last dense": without_ends,
    "scheme=W8A8 (dynamic)": changed("int8_static", scheme="W8A8"),
}
Results = dict[str, dict[str, list[float]]]
"""By arm: figures by name, one for each seed."""


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    results: dict[str, Results] = {}
    train, test = bench_vision.digits()
    for name, make in bench_vision.MODELS.items() if arguments.seeds else ():
        for seed in range(arguments.seeds):
            for arm, figures in one_seed(make, seed, arguments.epochs, train, test).items():
                for figure, value in figures.items():
                    results.setdefault(name, {}).setdefault(arm, {}).setdefault(figure, []).append(value)
                print(name, seed, arm, figures, flush=True)
    if arguments.material is not None:
        results["MiniLM"] = minilm_arms(arguments.material)
    publish(results, arguments)


def one_seed(
    make: Callable[[], nn.Module], seed: int, epochs: int, train: TensorDataset, test: TensorDataset
) -> dict[str, dict[str, float]]:
    """Figures of every arm."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        dense = bench_vision.fit(make, seed, epochs, [], train, Path(folder))
        trained = bench_vision.fit(make, seed, epochs, load_recipe("qat_int8_static"), train, Path(folder))
    results = {"float": figures_of(dense, dense, test), "qat_int8_static": figures_of(trained, None, test)}
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    batches = list(train.tensors[0][order[:512]].split(64))
    for arm, modifiers in AFTER.items():
        model = copy.deepcopy(dense)
        compress(model, modifiers(model), batches)
        with tempfile.TemporaryDirectory() as folder:
            save(model, folder)
            results[arm] = figures_of(load(folder, make()), dense, test)
    return results


@torch.no_grad()
def figures_of(model: nn.Module, dense: nn.Module | None, test: TensorDataset) -> dict[str, float]:
    """Accuracy, bytes, and the error beside the dense model, where the model is made from it."""
    figures = {"accuracy": bench_vision.accuracy(model, test), "bytes": float(integer_bytes(model))}
    if dense is not None:
        y, expected = model.eval()(test.tensors[0]), dense.eval()(test.tensors[0])
        figures["error"] = float((y - expected).square().sum() / expected.square().sum())
    return figures


def integer_bytes(model: nn.Module) -> int:
    """Bytes of codes and scales, and of all other tensors as they are."""
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    for module, record in Quantized.find(model).values():
        grids = (record.scale, record.zero_point, record.input_scale, record.input_zero_point)
        weight: Tensor = module.get_parameter("weight")
        size += weight.numel() - weight.nbytes + sum(tensor.nbytes for tensor in grids if tensor is not None)
    return size


def minilm_arms(material: Path) -> Results:
    """Cosines to the dense model of 2 x 64 texts of 64 tokens; calibrated on 64 others."""
    import minilm
    from transformers import AutoTokenizer

    folder, texts = material / "models/minilm", material / "texts"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    calibration = minilm.calibration_rows(tokenizer, texts, 64, 64)
    rows = minilm.evaluation_rows(tokenizer, texts, 64, 64)
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in calibration.split(16)]
    dense = minilm.load(folder)
    expected = minilm.embeddings(dense, rows)
    results: Results = {"float": {"cosine": [1.0], "least": [1.0], "bytes": [float(integer_bytes(dense))]}}
    for arm, modifiers in {n: m for n, m in AFTER.items() if "first" not in n}.items():
        model = copy.deepcopy(dense)
        compress(model, modifiers(model), batches)
        cosines = (minilm.embeddings(model, rows) * expected).sum(-1)
        figures = {"cosine": float(cosines.mean()), "least": float(cosines.min()), "bytes": float(integer_bytes(model))}
        results[arm] = {figure: [value] for figure, value in figures.items()}
        print("MiniLM", arm, figures, flush=True)
    return results


def publish(results: dict[str, Results], arguments: argparse.Namespace) -> None:
    """Print the tables, and write them unless it is a dry run."""
    digits = [[name, arm, *digits_row(figures, arms["float"])]
              for name, arms in results.items() if name != "MiniLM" for arm, figures in arms.items()]  # fmt: skip
    encoder = [[arm, f"{figures['cosine'][0]:.4f}", f"{figures['least'][0]:.4f}", f"{figures['bytes'][0] / 1e6:.2f}"]
               for arm, figures in results.get("MiniLM", {}).items()]  # fmt: skip
    lines: list[str] = []
    if digits:
        lines += machine.table(["model", "arm", "accuracy, %", "seeds", "to float", "error", "kB"], digits)
        what = f"{arguments.seeds} seeds, {arguments.epochs} epochs each"
        lines += ["", f"Mean and standard error over {what}, one thread. One test image is 0.17 points.", ""]
    if encoder:
        lines += machine.table(["MiniLM", "cosine, mean", "cosine, least", "MB"], encoder)
        lines += ["", "128 texts of 64 tokens that calibration (64 texts) does not see; embeddings stay float32.", ""]
    print("\n".join(lines))
    if not arguments.dry:
        title = "Static int8: rounding, GPTQ and QAT"
        print("written:", machine.write("static-int8", title, lines, {"results": results}, arguments.machine))


def digits_row(figures: dict[str, list[float]], dense: dict[str, list[float]]) -> list[str]:
    values = figures["accuracy"]
    gaps = [value - other for value, other in zip(values, dense["accuracy"], strict=True)]
    return [
        f"{mean(values):.2f} ± {bench_vision.standard_error(values):.2f}",
        ", ".join(f"{value:.2f}" for value in values),
        f"{mean(gaps):+.2f} ± {bench_vision.standard_error(gaps):.2f}",
        f"{mean(figures['error']):.1e}" if "error" in figures else "",
        f"{mean(figures['bytes']) / 1e3:.0f}",
    ]


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="0: without digits")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--material", type=Path, help="folder with models/minilm and texts; without it no MiniLM")
    machine.add_arguments(parser)
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
