"""A call of a model as an ONNX graph, by torch's exporter."""

import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from lightning_compress.export.hugging_face import is_transformers
from lightning_compress.export.onnx.sample import Call, named_tensors

__all__ = ["Function", "trace"]


class Function(nn.Module):
    """A model as a function of the tensors of a call alone, which returns a tuple of tensors."""

    def __init__(self, model: nn.Module, call: Call):
        super().__init__()
        self.model = model
        self._leaves, self._tree = call.leaves()
        self._places = [place for place, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]
        self.inputs = call.inputs(model)
        self.outputs: list[str] = []

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = list(self._leaves)
        for place, tensor in zip(self._places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self._tree)
        return tuple(self.named(self.model(*args, **kwargs)).values())

    def named(self, outputs: Any) -> dict[str, Tensor]:
        """The tensors of an output by name; remembers the names."""
        tensors = named_tensors(outputs)
        self.outputs = list(tensors)
        return tensors


def trace(function: Function, opset: int | None) -> Any:
    """The ``torch.onnx.ONNXProgram`` of a function, for any batch size and, with tokens, any length of sequences.

    Where the model fixes one of them, a warning says so.

    Raises:
        ValueError: torch cannot trace the model.
    """
    tensors, attempts = tuple(function.inputs.values()), _varying(function)
    if not function.outputs:
        function(*tensors)
    for varying in attempts:
        shapes = tuple({d: Dim.DYNAMIC for j, d in varying if j == i} or None for i in range(len(tensors)))
        try:
            traced = torch.export.export(function, tensors, dynamic_shapes=(shapes,))
            break
        except Exception as error:
            reason = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
            if not varying:
                kind = type(function.model).__name__
                raise ValueError(f"torch.export cannot trace this {kind} on the sample: {reason}") from error
            names = " and ".join(dict.fromkeys(varying.values()))
            warnings.warn(f"the file cannot have a varying {names}: {reason}", stacklevel=2)
    with _quiet():
        program = torch.onnx.export(
            traced,
            dynamo=True,
            verbose=False,
            opset_version=opset,
            input_names=list(function.inputs),
            output_names=function.outputs,
        )
    assert program is not None
    _rename_dimensions(program.model.graph, varying)
    return program


def _varying(function: Function) -> list[dict[tuple[int, int], str]]:
    """What to try in order: names of the dimensions that vary, by number of the input and of its dimension."""
    tensors = list(function.inputs.values())
    rows = next(len(tensor) for tensor in tensors if tensor.ndim)
    batch = {(i, 0): "batch" for i, tensor in enumerate(tensors) if tensor.ndim and len(tensor) == rows}
    tokens = {
        (i, 1): "sequence" for i, tensor in enumerate(tensors) if tensor.ndim == 2 and not tensor.is_floating_point()
    }
    return [batch | tokens, batch, {}] if tokens and is_transformers(function.model) else [batch, {}]


def _rename_dimensions(graph: Any, varying: Mapping[tuple[int, int], str]) -> None:
    """Names such as ``batch`` in place of torch's ``s77``, in the shapes of all values."""
    import onnx_ir as ir

    names = {str(graph.inputs[i].shape[d].value): name for (i, d), name in varying.items()}
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        if value.shape is not None and not value.shape.is_static():
            dims = [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape]
            value.shape = ir.Shape(
                [d if isinstance(d, int) else re.sub(r"\w+", lambda word: names.get(word[0], word[0]), d) for d in dims]
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, torch's exporter does not say that torchvision is missing."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
