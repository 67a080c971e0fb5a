"""The marks that tensors carry while a model runs, and what the run shows of its spaces.

A mark names the :class:`Space` of the last dimension of a tensor, the normalization that it has just passed, and
whether it is a value on its way through an attention.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_compress.modifiers.rotation.spaces import Head, Norm, Slot, Space, Touch, owner_of

__all__ = ["AttentionValue", "Mark", "Marks", "ParameterView", "Product"]


@dataclass(frozen=True)
class AttentionValue:
    """Output of a projection on its way through an attention."""

    touches: tuple[Touch, ...]  # rows of the projection, and of its bias
    width: int  # number of features beside each other
    is_uncut: bool = True  # not cut into heads yet, so that its features are rows of the weight
    mixed: bool = False  # a weighted sum over tokens

    def rows(self, start: int, stop: int) -> "AttentionValue":
        """Some of its features."""
        touches = tuple(replace(t, start=t.start + start, stop=t.start + stop) for t in self.touches)
        return replace(self, touches=touches, width=stop - start)


@dataclass(frozen=True)
class Mark:
    """What is known of the last dimension of a tensor."""

    space: Space | None
    norm: Norm | None = None
    value: AttentionValue | None = None


@dataclass(frozen=True)
class ParameterView:
    """A view of a parameter, and the dimensions of the parameter that its dimensions are."""

    slot: Slot
    dims: tuple[int, ...]


@dataclass
class Product:
    """A product with a parameter."""

    module: str  # the innermost one that ran
    reads: Touch  # the dimension of the weight that meets the input
    writes: tuple[Touch, ...]  # the dimension of the weight that gives the output, and the bias
    input_space: Space | None
    output_space: Space
    head: bool = False  # the inputs are values of an attention


class Marks:
    """Marks of tensors, and the spaces, heads and products that a run shows.

    Args:
        model: The model that runs.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.inside: list[str] = []  # names of the modules that run, outermost first
        self.spaces: list[Space] = []
        self.heads: list[Head] = []
        self.products: list[Product] = []  # in order
        self.attentions = 0  # that ran
        self.touched: set[int] = set()  # parameters that the run used, by id
        self._marks: dict[int, tuple[Tensor, Mark]] = {}  # with the tensor, so that no other one gets its id
        self._views: dict[int, tuple[Tensor, ParameterView]] = {}
        self._tables: dict[int, Space] = {}  # by id of the parameter

    def close(self) -> None:
        """Keep each space once, and let go of the tensors of the run."""
        self.spaces = list({id(space.root()): space.root() for space in self.spaces}.values())
        self._marks, self._views = {}, {}

    def get(self, x: Any) -> Mark | None:
        """The mark of a tensor."""
        entry = self._marks.get(id(x))
        return entry[1] if entry is not None else None

    def put(self, x: Any, mark: Mark | None) -> None:
        """Mark a tensor; None takes its mark off."""
        if isinstance(x, Tensor):
            if mark is None:
                self._marks.pop(id(x), None)
            else:
                self._marks[id(x)] = (x, mark)

    def put_value(self, x: Tensor, value: AttentionValue | None) -> None:
        """Mark a tensor as values of an attention that lie in no space; None takes its mark off."""
        self.put(x, None if value is None else Mark(None, value=value))

    def need(self, x: Any, reason: str) -> None:
        """Fix the space of x: an operation needs its last dimension as it is."""
        if (mark := self.get(x)) is not None and mark.space is not None:
            where = f" in {self.inside[-1]!r}" if self.inside and self.inside[-1] else ""
            mark.space.fix(reason + where)

    def need_all(self, name: str, args: Any, kwargs: Mapping[str, Any] | None = None) -> None:
        """Fix the spaces of all arguments of an operation."""
        for x in tree_leaves((args, kwargs)):
            self.need(x, f"{name} needs it as it is")

    def new_space(self, size: int) -> Space:
        self.spaces.append(Space(size))
        return self.spaces[-1]

    def table_space(self, slot: Slot, size: int) -> Space:
        """The space of the rows of a table of embeddings."""
        return self._tables.setdefault(id(slot.of(self.model)), self.new_space(size))

    def view(self, x: Any) -> ParameterView | None:
        """The parameter that x is, or is a view of; None where it is neither."""
        if isinstance(x, nn.Parameter):
            if id(x) not in self._views:
                slot = owner_of(self.model, x, self.inside)
                if slot is None:
                    return None
                self.touched.add(id(x))
                return ParameterView(slot, tuple(range(x.ndim)))  # not stored: a tied parameter has two owners
        entry = self._views.get(id(x))
        return entry[1] if entry is not None else None

    def put_view(self, x: Tensor, view: ParameterView) -> None:
        self._views[id(x)] = (x, view)

    def multiply(self, x: Tensor, weight: Any, dims: tuple[int, int], bias: Any, out: Tensor) -> None:
        """Record out = x W^T + b.

        Args:
            x: The input.
            weight: A parameter or a view of one, else the space of x is fixed.
            dims: Which dimensions of ``weight`` are its rows (outputs) and its columns.
            bias: None where there is none.
            out: The output.
        """
        mark, view = self.get(x), self.view(weight)
        if view is None:
            self.need(x, "it is multiplied by a weight that is not a parameter (fake-quantized or computed)")
            self.put(out, None)
            return
        rows, columns = dims
        reads = Touch(view.slot, view.dims[columns], mark.norm if mark else None)
        space, touches = self.new_space(out.shape[-1]), [Touch(view.slot, view.dims[rows])]
        if bias is not None:
            bias_view = self.view(bias)
            if bias_view is None:
                space.fix("a bias that is not a parameter is added")
            else:
                touches.append(Touch(bias_view.slot, bias_view.dims[-1]))
        space.writers += touches
        if mark is not None and mark.space is not None:
            mark.space.root().readers.append(reads)
        is_head = mark is not None and mark.value is not None and mark.value.mixed
        if mark is not None and mark.value is not None and is_head:
            self.heads.append(Head(mark.value.touches, replace(reads, norm=None), mark.value.width))
        module = self.inside[-1] if self.inside else ""
        input_space = mark.space if mark is not None else None
        self.products.append(Product(module, reads, tuple(touches), input_space, space, is_head))
        self.put(out, Mark(space, value=AttentionValue(tuple(touches), out.shape[-1])))

    def normalize(self, norm: Norm, x: Tensor, out: Tensor) -> None:
        """Record a normalization of x."""
        mark = self.get(x)
        self.put(out, None)
        for slot in (norm.gain, norm.bias):
            if slot is not None:
                self.touched.add(id(slot.of(self.model)))
        if mark is not None and mark.space is not None:
            if mark.norm is not None:
                mark.space.fix(f"{norm.module!r} normalizes what {mark.norm.module!r} has normalized")
            else:
                mark.space.root().norms.append(norm)
                self.put(out, Mark(mark.space, norm))

    def unite(self, name: str, one: Any, two: Any, out: Any) -> None:
        """Record that two vectors are added, or lie in one tensor: their spaces are one."""
        first, second = self.get(one), self.get(two)
        if first is None or second is None or first.space is None or second.space is None:
            self._unite_parameter(name, *((one, two) if first is not None else (two, one)), out)
            return
        if one.shape[-1] != two.shape[-1]:
            self.need_all(f"{name} of another width", (one, two))
            self.put(out, None)
            return
        first.space.join(second.space)
        norms = {first.norm, second.norm}
        if len(norms) > 1 or first.norm is not None:
            named = ", ".join(sorted(repr(norm.module) for norm in norms if norm is not None))
            self.need(one, f"the output of {named} is added to it")
        self.put(out, Mark(first.space, first.norm))

    def _unite_parameter(self, name: str, x: Any, other: Any, out: Any) -> None:
        """A parameter whose rows are vectors of the space of x, such as learned positions; nothing else."""
        mark, view = self.get(x), self.view(other)
        is_plain = mark is not None and mark.space is not None and mark.norm is None
        if is_plain and view is not None and other.ndim and other.shape[-1] == x.shape[-1]:
            assert mark is not None
            assert mark.space is not None
            mark.space.root().sources.append(Touch(view.slot, view.dims[-1]))
            self.put(out, Mark(mark.space))
        else:
            self.need_all(f"{name} of something else", (x, other))
            self.put(out, None)
