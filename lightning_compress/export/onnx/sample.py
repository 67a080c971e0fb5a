"""The call of a model that is traced: its tensors are the inputs of the file, everything else is a constant."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.export import hugging_face
from lightning_compress.layers.forward import eval_mode

__all__ = ["Call", "call_of", "named_tensors", "recorded_call"]

UNUSED = ("labels",)  # of models of transformers: with them the output has a loss


@dataclass(frozen=True)
class Call:
    """Arguments of one call of a model."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    is_real: bool = True  # False: inputs that were made up, whose values mean nothing

    def leaves(self) -> tuple[list[Any], pytree.TreeSpec]:
        """All values of the arguments, in order, and the tree that they are in."""
        return pytree.tree_flatten((list(self.args), dict(self.kwargs)))

    def inputs(self, model: nn.Module) -> dict[str, Tensor]:
        """The tensors, by the name of their argument."""
        parameters = list(inspect.signature(model.forward).parameters)
        names = [parameters[i] if i < len(parameters) else f"input_{i}" for i in range(len(self.args))]
        return named_tensors(dict(zip(names, self.args, strict=True)) | dict(self.kwargs))


def call_of(model: nn.Module, sample: Any) -> Call:
    """The call that a sample means, on the device of the model; with at least two rows, so that the batch can vary.

    Args:
        model: The model.
        sample: A tensor; a tuple or list of arguments; a dict of keyword arguments; a :class:`Call`; None: the
            ``dummy_inputs`` of a model of transformers.
    """
    is_transformers = hugging_face.is_transformers(model)
    if sample is None and not is_transformers:
        raise ValueError(
            f"the format 'onnx' traces a call: give sample=x, a batch of real inputs of this {type(model).__name__} (a "
            f"tensor, a tuple of arguments or a dict of keyword arguments)"
        )
    if sample is None:
        sample = Call((), hugging_face.example_of(model), is_real=False)
    elif isinstance(sample, Tensor):
        sample = Call((sample,), {})
    elif isinstance(sample, Mapping):
        sample = Call((), dict(sample))
    elif isinstance(sample, tuple | list):
        sample = Call(tuple(sample), {})
    elif not isinstance(sample, Call):
        raise ValueError(f"sample is a {type(sample).__name__}, expected a tensor, a tuple or a dict")
    kwargs = dict(sample.kwargs)
    if is_transformers:
        kwargs = {name: value for name, value in kwargs.items() if name not in UNUSED}
        if "use_cache" in inspect.signature(model.forward).parameters:
            kwargs["use_cache"] = False
    tensors = [leaf for leaf in pytree.tree_leaves((sample.args, kwargs)) if isinstance(leaf, Tensor)]
    if not tensors:
        raise ValueError("sample holds no tensor, so that the file would have no input")
    rows = next((len(tensor) for tensor in tensors if tensor.ndim), 0)
    device = next(model.parameters(), tensors[0]).device

    def prepare(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        tensor = leaf.detach().to(device)
        return torch.cat([tensor, tensor]) if rows == 1 and tensor.ndim and len(tensor) == 1 else tensor

    args, kwargs = pytree.tree_map(prepare, (tuple(sample.args), kwargs))
    return Call(args, kwargs, sample.is_real)


def named_tensors(values: Any) -> dict[str, Tensor]:
    """The tensors among arguments or outputs by name; those of a tuple are ``NAME_0``, ``NAME_1`` and so on."""
    items = values.items() if isinstance(values, Mapping) else [("output", values)]
    return {name: tensor for key, value in items for name, tensor in _tensors_in(key, value)}


def _tensors_in(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _tensors_in(f"{name}_{key}", inner)
    elif isinstance(value, tuple | list):
        for place, inner in enumerate(value):
            yield from _tensors_in(f"{name}_{place}", inner)


def recorded_call(model: nn.Module, run: Callable[[], Any]) -> Call:
    """The first call of the model that ``run`` makes."""
    calls: list[Call] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(Call(args, dict(kwargs)))

    handle = model.register_forward_pre_hook(record, with_kwargs=True, prepend=True)
    try:
        with torch.no_grad(), eval_mode(model):
            run()
    finally:
        handle.remove()
    if not calls:
        raise ValueError("the model was not called on a calibration batch, so that no call can be traced")
    return calls[0]
