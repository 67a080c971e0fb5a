"""Linears that multiply the same x, such as q, k and v, as one product: one quantization of x, one call, longer rows.

They stay separate modules, with their names in the state dict. The first one that is called computes the product of
all, and the others return their rows of it when they get the same tensor object, unchanged; the first time that one
gets another tensor, the group is dissolved. Calls that need a gradient, and calls under torch.compile, are separate.
"""

from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_compress.layers.memory import release
from lightning_compress.quant.packed.linear import PackedLinear

__all__ = ["Siblings", "fuse_siblings"]


def fuse_siblings(model: nn.Module, *args: Any, **kwargs: Any) -> list[tuple[str, ...]]:
    """Find packed Linears of one module that multiply the same tensor, and let each group make one product.

    The model is called once, to see which tensor each of them gets. Members of a group have one scheme, equal columns,
    and equal static scales of inputs.

    Args:
        model: With :class:`PackedLinear` inside.
        args: Example inputs of the model.
        kwargs: Example inputs by name.

    Returns:
        The names in each group.
    """
    seen = _inputs_of(model, args, kwargs)
    groups: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for name, inputs in seen.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, PackedLinear)
        if inputs and _stacks(layer):
            groups[(name.rpartition(".")[0], tuple(map(id, inputs)), _agreement(layer))].append(name)
    fused = [tuple(names) for names in groups.values() if len(names) > 1]
    for names in fused:
        layers = [model.get_submodule(name) for name in names]
        siblings = Siblings([layer for layer in layers if isinstance(layer, PackedLinear)])
        siblings.stacked()  # not at the first call, which may be inside of the capture of a CUDA graph
        for layer in siblings.layers:
            layer.siblings = siblings
    return fused


class Siblings:
    """A group of packed Linears that make one product, rows stacked in this order; each member calls ``product``."""

    def __init__(self, layers: Sequence[PackedLinear]):
        self.layers = tuple(layers)
        self.sizes = [layer.out_features for layer in layers]
        self._stacked: PackedLinear | None = None
        self._x: Tensor | None = None
        self._version = 0
        self._waiting: dict[int, Tensor] = {}

    def product(self, layer: PackedLinear, x: Tensor) -> Tensor:
        """x W^T of one member."""
        if torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()):
            return layer.product(x)
        version = 0 if x.is_inference() else x._version
        if self._waiting and self._x is x and self._version == version and id(layer) in self._waiting:
            y = self._waiting.pop(id(layer))
        elif self._waiting:  # another x, while rows of the last product are still waiting
            self.dissolve()
            return layer.product(x)
        else:
            products = self.stacked().product(x).split(self.sizes, -1)
            self._waiting = {id(member): y for member, y in zip(self.layers, products, strict=True)}
            self._x, self._version = x, version
            y = self._waiting.pop(id(layer))
        if not self._waiting:
            self._x = None
        return y

    def is_best_dense(self, x: Tensor) -> bool:
        """Whether ``fastest`` computes the product of all densely, which each member then does by itself."""
        return self.stacked().is_best_dense(x)

    def stacked(self) -> PackedLinear:
        """All members as one Linear; their tensors become views of its tensors, so that there is one copy."""
        if self._stacked is None:
            members = [layer.tensors() for layer in self.layers]
            tensors = {}
            for name, value in members[0].items():
                if name == "weight_shape":
                    tensors[name] = torch.tensor(
                        [sum(self.sizes), self.layers[0].in_features], dtype=torch.int64, device="cpu"
                    )
                elif _is_shared(name):
                    tensors[name] = value
                else:
                    tensors[name] = torch.cat([member[name] for member in members])
            self._stacked = PackedLinear(tensors, self.layers[0].scheme)
            self._stacked.fastest = self.layers[0].fastest
            for layer, member, start in zip(self.layers, members, accumulate(self.sizes, initial=0), strict=False):
                rows = {name: len(value) for name, value in member.items() if not _is_shared(name)}
                layer.be_rows_of(self._stacked, start, rows)
        return self._stacked

    def forget(self) -> None:
        """Stack the tensors of the members again at the next call: they have changed or moved."""
        self._stacked, self._x, self._waiting = None, None, {}

    def dissolve(self) -> None:
        """Let each member compute its own product from now on."""
        self.forget()
        for layer in self.layers:
            layer.siblings = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_stacked": None, "_x": None, "_waiting": {}}


def _is_shared(name: str) -> bool:
    """Whether the group has one such tensor, not one for each member."""
    return name.startswith("input_") or name in ("weight_global_scale", "weight_shape")


def _stacks(layer: PackedLinear) -> bool:
    """Whether the rows of its tensors can be followed by those of another."""
    weights = layer.scheme.weights
    whole_words = "weight_zero_point" not in layer.kinds() or layer.out_features * weights.num_bits % 32 == 0
    return weights.strategy in ("channel", "group", "tensor_group") and whole_words


def _agreement(layer: PackedLinear) -> tuple[Any, ...]:
    """A key that is equal for layers that may be stacked."""
    kinds = {name: t for name, t in layer.kinds().items() if name != "weight_shape"}
    rows = tuple((name, t.dtype, t.shape[1:]) for name, t in kinds.items())
    shared = tuple(tuple(t.flatten().tolist()) for name, t in kinds.items() if _is_shared(name))
    return layer.scheme.model_dump_json(exclude={"targets"}), layer.in_features, layer.device, rows, shared


def _inputs_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, list[Tensor]]:
    """The tensors that each packed Linear got, in the order of its calls; a copy of one that was changed in between."""
    seen: dict[str, list[Tensor]] = {}
    copies: dict[int, Tensor] = {}

    def note(name: str, inputs: tuple[Any, ...]) -> None:
        (x,) = inputs
        if not torch.equal(copies.setdefault(id(x), x.clone()), x):
            x = x.clone()  # changed in place: not the same x any more
        seen.setdefault(name, []).append(x)

    def forget(layer: PackedLinear, _args: Any, _output: Any) -> None:
        layer.forget()  # one dense weight at a time, where no backend takes the calls
        release()

    layers = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    handles: list[RemovableHandle] = [
        layer.register_forward_pre_hook(lambda _module, inputs, name=name: note(name, inputs))
        for name, layer in layers.items()
    ]
    handles += [layer.register_forward_hook(forget) for layer in layers.values()]
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return seen
