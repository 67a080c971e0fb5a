"""A folder with a compressed model as ``model.onnx``.

model.onnx              the model; above 2 GB its weights are in model.onnx.data
config.json             of a model of transformers, and the files of its tokenizer, where there is one
recipe.yaml             the recipe, where one was given
export_manifest.json    the names of these files, and of the run that wrote them
"""

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.export import hugging_face
from lightning_compress.export.contents import check_weights
from lightning_compress.export.onnx.expressible import check_model, check_packages
from lightning_compress.export.onnx.graph import mend_graph
from lightning_compress.export.onnx.modules import INT4, codes_of, int4_weights, with_codes
from lightning_compress.export.onnx.noise import NOISE, noisy_inputs
from lightning_compress.export.onnx.output_grids import add_grids, open_outputs, round_before_relu
from lightning_compress.export.onnx.program import Function, trace
from lightning_compress.export.onnx.runtime import TOLERANCE, difference, extremes, outputs_of
from lightning_compress.export.onnx.sample import Call, call_of
from lightning_compress.export.rehearsal import check_adapters, check_processors
from lightning_compress.files.atomic_folder import whole_folder
from lightning_compress.layers.forward import eval_mode
from lightning_compress.layers.matching import clean_name, shortlist
from lightning_compress.layers.weight_slice import WeightSlice
from lightning_compress.quant.packed import unpacked
from lightning_compress.quant.record import Quantized

__all__ = ["FILE", "OnnxFile", "write_onnx"]

FILE = "model.onnx"
BLOCKS_OPSET = 21  # of DequantizeLinear with INT4 or with block_size
ROUNDED_TOLERANCE = 0.05  # where outputs of convolutions are rounded too
LARGEST_MESSAGE = 2**31


@dataclass(frozen=True)
class OnnxFile:
    """What was written."""

    folder: Path
    difference: float  # from the outputs of the model in memory, relative to their norm

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / FILE

    @property
    def size(self) -> int:
        """Bytes of the model on disk."""
        return sum(file.stat().st_size for file in self.folder.glob(f"{FILE}*"))


def write_onnx(
    model: nn.Module,
    folder: str | Path,
    *,
    sample: Any = None,
    processors: Sequence[Any] = (),
    recipe_yaml: str | None = None,
    overwrite: bool = False,
    origin: Mapping[str, Any] | None = None,
) -> OnnxFile:
    """Write a model as ONNX, for any batch size; the model does not change, and the folder appears whole or not at all.

    A model in 16 bits becomes a file in float32: the codes, and scales of the same value.

    Args:
        model: The model.
        folder: Folder to write.
        sample: The inputs of one call (onnx/sample.py); real ones, of which the outputs of convolutions get grids.
        processors: Tokenizers and processors to save with it.
        recipe_yaml: The text of recipe.yaml.
        overwrite: As of :func:`lightning_compress.save`.
        origin: The same.

    Raises:
        ValueError: A package is missing, ONNX cannot express a scheme, torch cannot trace the model, or ONNX Runtime
            computes other outputs than the model.
    """
    check_packages()
    check_adapters(model)
    check_processors(processors)
    with unpacked(model), torch.no_grad(), eval_mode(model):
        check_weights(model, {})
        check_model(model)
        _warn_of_slices([clean_name(n) for n, (m, _) in Quantized.find(model).items() if isinstance(m, WeightSlice)])
        with whole_folder(folder, overwrite=overwrite, origin=origin) as partial:
            gap = _write(model, call_of(model, sample), partial / FILE)
            if hugging_face.is_transformers(model):
                hugging_face.dense_config(model.config).save_pretrained(partial)
            for processor in processors:
                processor.save_pretrained(partial)
            if recipe_yaml is not None:
                (partial / "recipe.yaml").write_text(recipe_yaml, encoding="utf-8")
    return OnnxFile(Path(folder).expanduser().resolve(), gap)


def _write(model: nn.Module, call: Call, file: Path) -> float:
    """Write the file and compare it with the model; returns the difference."""
    codes = codes_of(model)
    if any(p.is_floating_point() and p.dtype != torch.float32 for p in model.parameters()):
        model, call = copy.deepcopy(model).float(), _in_float32(call)
    function = Function(model, call)
    inputs = function.inputs
    expected = function.named(model(*call.args, **call.kwargs))
    blocks = any(r.scheme.weights.num_bits <= INT4 or r.scheme.weights.group_size for _, r in codes.values())
    with with_codes(model, codes) as reached:
        program = trace(function, BLOCKS_OPSET if blocks else None)
    _warn_of_unused([clean_name(name) for name in codes if name not in reached])
    graph = program.model.graph
    mend_graph(graph, int4_weights(codes))
    round_before_relu(graph)
    program.save(file)
    gap, name = difference(outputs_of(file, inputs), expected)
    if not gap <= TOLERANCE:
        _check_against_noise(model, function, call, expected, gap, name)
    layers = open_outputs(graph)
    if not layers:
        return gap
    if not call.is_real or file.stat().st_size > LARGEST_MESSAGE:
        warnings.warn(
            f"{len(layers)} convolutions, such as the one that computes {next(iter(layers))!r}, run in float32, since "
            f"nothing says on which grid their outputs are; give sample=x, a batch of real inputs",
            stacklevel=3,
        )
        return gap
    add_grids(graph, lambda names: extremes(program.model, names, inputs))
    rounded = file.with_name(f"rounded-{FILE}")
    program.save(rounded)
    rounded_gap, name = difference(outputs_of(rounded, inputs), expected)
    if rounded_gap <= ROUNDED_TOLERANCE:
        rounded.replace(file)
        return rounded_gap
    rounded.unlink()
    warnings.warn(
        f"{len(layers)} convolutions run in float32: with rounded outputs {name!r} differs by {100 * rounded_gap:.3g} "
        f"% of its norm from the model in memory, expected at most {100 * ROUNDED_TOLERANCE:g} %",
        stacklevel=3,
    )
    return gap


def _check_against_noise(
    model: nn.Module, function: Function, call: Call, expected: dict[str, Tensor], gap: float, name: str
) -> None:
    """ValueError where the outputs differ by more than twice of what the last bits of float32 do to the model."""
    with noisy_inputs(model):
        noise, _ = difference(function.named(model(*call.args, **call.kwargs)), expected)
    if not gap <= 2 * noise:
        raise ValueError(
            f"ONNX Runtime computes other outputs from the file than the model in memory: {name!r} differs by "
            f"{100 * gap:.3g} % of its norm on the sample, expected at most {100 * max(TOLERANCE, 2 * noise):.3g} %; "
            f"nothing is written"
        )
    warnings.warn(
        f"the outputs of this model hang on the last bits of float32: they move by {100 * noise:.3g} % of their norm "
        f"on the sample where inputs of layers move by {NOISE:g}, and in ONNX Runtime by {100 * gap:.3g} %; measure "
        f"the file by your own metric, or leave layers with large outliers in their inputs dense",
        stacklevel=4,
    )


def _in_float32(call: Call) -> Call:
    args, kwargs = pytree.tree_map_only(
        Tensor, lambda t: t.float() if t.is_floating_point() else t, (call.args, dict(call.kwargs))
    )
    return Call(args, kwargs, call.is_real)


def _warn_of_slices(names: list[str]) -> None:
    """Warn of weights of recurrent and attention modules, which are inputs of one node."""
    if names:
        warnings.warn(
            f"{len(names)} weights of recurrent and attention modules, such as {shortlist(names)}, are written in "
            f"float32, on their grid: the file does not get smaller by them",
            stacklevel=4,
        )


def _warn_of_unused(names: list[str]) -> None:
    """Warn of quantized modules that the call does not reach: their weights are not in the file."""
    if names:
        warnings.warn(
            f"the call that was traced does not use {len(names)} quantized modules, such as {shortlist(names)}, so "
            f"that the file does not hold them",
            stacklevel=4,
        )
