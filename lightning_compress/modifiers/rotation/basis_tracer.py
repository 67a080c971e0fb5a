"""The marks that tensors carry while a model runs, and how each kind of operation hands them on.

A mark names the :class:`Space` of a tensor's last dimension, the normalization that
it has just passed, and whether it is a value on its way through an attention.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lightning_compress.modifiers.rotation.spaces import Head, Norm, Slot, Space, Touch, owner_of
from lightning_compress.modifiers.rotation.views import dims_of_view, keeps_last

__all__ = ["Linear", "Watcher"]


@dataclass(frozen=True)
class Value:
    """On its way through an attention: rows of a projection, ``width`` of them beside each other, mixed over tokens."""

    touches: tuple[Touch, ...]
    width: int
    whole: bool = True  # not yet cut into heads, so that its features are rows of the weight
    mixed: bool = False


@dataclass(frozen=True)
class Mark:
    """What is known of a tensor's last dimension."""

    space: Space | None
    norm: Norm | None = None
    value: Value | None = None


@dataclass(frozen=True)
class View:
    """A parameter, and which of its dimensions those of the view are."""

    slot: Slot
    dims: tuple[int, ...]


@dataclass
class Linear:
    """A product with a parameter.

    Args:
        module: Name of the innermost module that ran.
        reads: The dimension of the weight that its input meets.
        writes: That of its output, and the bias.
        input_space: Of its input, if known.
        output_space: Of its output.
        head: Its inputs are values of an attention.
    """

    module: str
    reads: Touch
    writes: tuple[Touch, ...]
    input_space: Space | None
    output_space: Space
    head: bool = False


class Watcher(TorchFunctionMode):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.inside: list[str] = []  # names of the modules that run, outermost first
        self.asleep = 0  # inside of a normalization, which is seen as one operation
        self.spaces: list[Space] = []
        self.heads: list[Head] = []
        self.linears: list[Linear] = []
        self.attentions = 0
        self.touched: set[int] = set()
        self._marks: dict[int, tuple[Tensor, Mark]] = {}  # keeps the tensor, so that its id stays its own
        self._views: dict[int, tuple[Tensor, View]] = {}
        self._tables: dict[int, Space] = {}  # by id of the parameter

    # -- marks -------------------------------------------------------------------------------------------------------

    def mark(self, x: Any) -> Mark | None:
        kept = self._marks.get(id(x))
        return kept[1] if kept is not None else None

    def put(self, x: Any, mark: Mark | None) -> None:
        if isinstance(x, Tensor):
            if mark is None:
                self._marks.pop(id(x), None)
            else:
                self._marks[id(x)] = (x, mark)

    def need(self, x: Any, reason: str) -> None:
        """Something needs the last dimension of x as it is."""
        if (mark := self.mark(x)) is not None and mark.space is not None:
            where = f" in {self.inside[-1]!r}" if self.inside and self.inside[-1] else ""
            mark.space.fix(reason + where)

    def space(self, size: int) -> Space:
        self.spaces.append(Space(size))
        return self.spaces[-1]

    def view(self, x: Any) -> View | None:
        """Which parameter (or part of one) this is."""
        if isinstance(x, nn.Parameter):
            if id(x) not in self._views:
                slot = owner_of(self.model, x, self.inside)
                if slot is None:
                    return None
                self.touched.add(id(x))
                return View(slot, tuple(range(x.ndim)))  # asked anew each time: a tied one has two places
        kept = self._views.get(id(x))
        return kept[1] if kept is not None else None

    # -- operations --------------------------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        out = func(*args, **kwargs)
        if not self.asleep:
            name = getattr(func, "__name__", "").strip("_")
            self.see(_IN_PLACE.get(name, name), args, kwargs, out)
        return out

    def see(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Hand marks on from the arguments of an operation to its results."""
        if name == "setitem":
            self._unite(name, args[0], args[2], args[0])
            return
        tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if not tensors:
            if name in ("item", "tolist"):
                self._need_all(name, args, kwargs)
            return
        if self._see_parameter(name, args, tensors):
            return
        marked = [x for x in tree_leaves((args, kwargs)) if self.mark(x) is not None]
        handler = _HANDLERS.get(name)
        if handler is not None and (marked or name in _MAKERS):
            handler(self, name, args, kwargs, out)
        elif marked:
            self._need_all(name, args, kwargs)
            for x in tensors:
                if not any(x is m for m in marked):
                    self.put(x, None)

    def _need_all(self, name: str, args: Any, kwargs: Any) -> None:
        for x in tree_leaves((args, kwargs)):
            self.need(x, f"{name} needs it as it is")

    def _see_parameter(self, name: str, args: tuple[Any, ...], tensors: list[Tensor]) -> bool:
        """Views of parameters; True when this was one."""
        view = self.view(args[0]) if args and name in _OF_PARAMETERS else None
        if view is None or len(tensors) != 1:
            return False
        x, out = args[0], tensors[0]
        dims = dims_of_view(name, x, out, view.dims)
        if dims is not None:
            self._views[id(out)] = (out, View(view.slot, dims))
        return dims is not None

    def linear(self, x: Tensor, weight: Any, rows: int, columns: int, bias: Any, out: Tensor) -> None:
        """out = x W^T + b; ``rows`` and ``columns`` say which dimensions of the weight's view these are."""
        mark, view = self.mark(x), self.view(weight)
        if view is None:
            self.need(x, "it is multiplied by a weight that is no parameter (fake-quantized or computed)")
            self.put(out, None)
            return
        reads = Touch(view.slot, view.dims[columns], mark.norm if mark else None)
        writes = Touch(view.slot, view.dims[rows])
        space = self.space(out.shape[-1])
        space.writers.append(writes)
        touches = [writes]
        if bias is not None:
            bias_view = self.view(bias)
            if bias_view is None:
                space.fix("a bias that is no parameter is added")
            else:
                touches.append(Touch(bias_view.slot, bias_view.dims[-1]))
                space.writers.append(touches[-1])
        if mark is not None and mark.space is not None:
            mark.space.root().readers.append(reads)
        is_head = mark is not None and mark.value is not None and mark.value.mixed
        if is_head:
            assert mark is not None
            assert mark.value is not None
            self.heads.append(Head(mark.value.touches, replace(reads, norm=None), mark.value.width))
        where = self.inside[-1] if self.inside else ""
        space_in = mark.space if mark is not None else None
        self.linears.append(Linear(where, reads, tuple(touches), space_in, space, is_head))
        self.put(out, Mark(space, value=Value(tuple(touches), out.shape[-1])))

    def norm(self, norm: Norm, x: Tensor, out: Tensor) -> None:
        """A normalization of x has given ``out``."""
        mark = self.mark(x)
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

    # -- one handler for each kind of operation ----------------------------------------------------------------------

    def _linear(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if name == "linear":
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            self.linear(args[0] if args else kwargs["input"], weight, -2, -1, bias, out)
        elif name == "addmm":
            self.linear(args[1], args[2], -1, -2, args[0], out)
        elif self.view(args[1]) is not None:
            self.linear(args[0], args[1], -1, -2, None, out)
        else:  # attention weights times values
            left, right = self.mark(args[0]), self.mark(args[1])
            self._need_all(name, args, kwargs)
            mixes = right is not None and right.value is not None and out.shape[-1] == right.value.width
            self.attentions += mixes and left is None
            self.put(
                out,
                Mark(None, value=replace(right.value, mixed=True))
                if mixes and left is None and right and right.value
                else None,
            )

    def _attention(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        names = ("query", "key", "value")
        query, key, value = (args[i] if i < len(args) else kwargs[names[i]] for i in range(3))
        mark = self.mark(value)
        for x in (query, key, value):
            self.need(x, "attention needs it as it is")
        self.attentions += 1
        mixes = mark is not None and mark.value is not None and out.shape[-1] == mark.value.width
        self.put(out, Mark(None, value=replace(mark.value, mixed=True)) if mixes and mark and mark.value else None)

    def _embedding(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        view = self.view(weight)
        if view is not None:
            space = self._tables.setdefault(id(view.slot.of(self.model)), self.space(out.shape[-1]))
            space.root().sources.append(Touch(view.slot, view.dims[-1]))
            self.put(out, Mark(space))

    def _fresh(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Zeros: they lie in every space, and so in that of what is added to them."""
        if out.ndim:
            self.put(out, Mark(self.space(out.shape[-1])))

    def _filled(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """A tensor that is like another only in shape and dtype."""

    def _same(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """The last dimension stays, or is split into heads."""
        x = args[0] if args else kwargs["input"]
        mark = self.mark(x)
        if mark is None or not isinstance(out, Tensor):
            return self._need_all(name, args, kwargs)
        if out is x:
            return None
        if keeps_last(name, x, args, kwargs, out):
            return self.put(out, mark)
        self.need(x, f"{name} takes its features apart")
        return self.put(out, self._split_heads(name, x, mark, args, out))

    def _split_heads(self, name: str, x: Tensor, mark: Mark, args: tuple[Any, ...], out: Tensor) -> Mark | None:
        """Values that are cut into heads, or put together again."""
        value = mark.value
        if value is None:
            return None
        if name in ("view", "reshape", "unflatten", "flatten"):
            width = min(value.width, out.shape[-1])
            divides = value.width % width == 0 and out.shape[-1] % width == 0
            return Mark(None, value=replace(value, width=width, whole=False)) if divides else None
        if name == "getitem" and value.whole and isinstance(args[1], tuple):
            last = args[1][-1]
            if isinstance(last, slice) and last.step in (None, 1) and args[1][0] is Ellipsis:
                start, stop, _ = last.indices(x.shape[-1])
                return Mark(None, value=_rows(value, start, stop))
        return None

    def _pieces(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """split, chunk, unbind."""
        x = args[0]
        mark = self.mark(x)
        default = 0
        dim = (
            kwargs.get("dim", args[2] if len(args) > 2 else default)
            if name != "unbind"
            else kwargs.get("dim", args[1] if len(args) > 1 else default)
        )
        if mark is None:
            return self._need_all(name, args, kwargs)
        if dim % x.ndim != x.ndim - 1:
            for piece in out:
                self.put(piece, mark)
            return None
        self.need(x, f"{name} takes its features apart")
        start = 0
        for piece in out:
            whole = mark.value is not None and mark.value.whole
            stop = start + (piece.shape[-1] if name != "unbind" else 1)
            keep = whole and name != "unbind" and mark.value is not None
            self.put(piece, Mark(None, value=_rows(mark.value, start, stop)) if keep and mark.value else None)
            start = stop
        return None

    def _sum(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        self._unite(name, args[0], args[1] if len(args) > 1 else kwargs.get("other"), out)

    def _unite(self, name: str, one: Any, two: Any, out: Any) -> None:
        """Two vectors are added, or lie in one tensor."""
        first, second = self.mark(one), self.mark(two)
        if first is None or second is None or first.space is None or second.space is None:
            known, other = (one, two) if first is not None else (two, one)
            mark, view = self.mark(known), self.view(other)
            same = isinstance(other, Tensor) and other.ndim and other.shape[-1] == known.shape[-1]
            if mark is not None and mark.space is not None and mark.norm is None and view is not None and same:
                mark.space.root().sources.append(Touch(view.slot, view.dims[-1]))  # such as learned positions
                self.put(out, Mark(mark.space))
                return
            self._need_all(f"{name} of something else", (one, two), {})
            self.put(out, None)
            return
        if one.shape[-1] != two.shape[-1]:
            self._need_all(f"{name} of another width", (one, two), {})
            self.put(out, None)
            return
        first.space.join(second.space)
        norms = {first.norm, second.norm}
        if len(norms) > 1 or first.norm is not None:
            named = ", ".join(sorted(repr(norm.module) for norm in norms if norm is not None))
            self.need(one, f"the output of {named} is added to it")
        self.put(out, Mark(first.space, first.norm))

    def _scaled(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Times or divided by a number, or one number per token."""
        one, two = args[0], args[1] if len(args) > 1 else kwargs.get("other")
        if self.mark(one) is None:
            one, two = two, one
        mark = self.mark(one)
        by_number = not isinstance(two, Tensor) or two.numel() == 1 or (two.ndim > 0 and two.shape[-1] == 1)
        if mark is None or not by_number or (name in ("div", "truediv") and one is not args[0]):
            self._need_all(name, args, kwargs)
            self.put(out, None)
        else:
            self.need(two, f"{name} needs it as it is")
            self.put(out, replace(mark, value=None))

    def _index_add(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        target, dim, source = args[0], args[1], args[3] if len(args) > 3 else kwargs.get("source")
        if isinstance(dim, int) and dim % target.ndim != target.ndim - 1 and isinstance(source, Tensor):
            self._unite(name, target, source, out)
        else:
            self._need_all(name, args, kwargs)
            self.put(out, None)

    def _joined(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """cat of other dimensions."""
        parts, dim = args[0], kwargs.get("dim", args[1] if len(args) > 1 else 0)
        if dim % out.ndim == out.ndim - 1 or any(self.mark(part) is None for part in parts):
            self._need_all(name, args, kwargs)
            self.put(out, None)
            return
        for part in parts:
            self._unite(name, parts[0], part, out)


def _rows(value: Value, start: int, stop: int) -> Value:
    cut = tuple(replace(t, start=t.start + start, stop=t.start + stop) for t in value.touches)
    return replace(value, touches=cut, width=stop - start)


_SAME = frozenset({
    "to", "float", "half", "double", "bfloat16", "type", "type_as", "contiguous", "clone", "detach", "dropout", "alias",
    "unsqueeze", "squeeze", "expand", "expand_as", "repeat", "view", "reshape", "view_as", "flatten", "unflatten",
    "transpose", "swapaxes", "swapdims", "permute", "t", "get", "getitem", "repeat_interleave", "index_select",
    "narrow", "masked_fill", "cpu", "cuda",
})  # fmt: skip
_OF_PARAMETERS = frozenset({
    "to", "float", "half", "double", "bfloat16", "type", "type_as", "contiguous", "clone", "detach", "t", "transpose",
    "permute", "get", "T", "mT", "getitem", "view", "unsqueeze", "expand", "reshape",
})  # fmt: skip
_IN_PLACE: Mapping[str, str] = {"radd": "add", "rmul": "mul", "iadd": "add", "isub": "sub", "imul": "mul",
                                "itruediv": "truediv"}  # fmt: skip
_MAKERS = frozenset({"embedding", "linear", "addmm", "matmul", "mm", "zeros_like", "new_zeros",
                     "scaled_dot_product_attention"})  # fmt: skip
_HANDLERS: Mapping[str, Callable[..., Any]] = {
    **dict.fromkeys(("linear", "addmm", "matmul", "mm", "bmm"), Watcher._linear),
    **dict.fromkeys(_SAME, Watcher._same),
    **dict.fromkeys(("split", "chunk", "unbind", "tensor_split"), Watcher._pieces),
    **dict.fromkeys(("add", "sub"), Watcher._sum),
    **dict.fromkeys(("mul", "div", "truediv"), Watcher._scaled),
    **dict.fromkeys(("zeros_like", "new_zeros"), Watcher._fresh),
    **dict.fromkeys(("cat", "concat"), Watcher._joined),
    **dict.fromkeys(("new_ones", "ones_like", "new_full", "full_like", "new_tensor"), Watcher._filled),
    "index_add": Watcher._index_add,
    "embedding": Watcher._embedding,
    "scaled_dot_product_attention": Watcher._attention,
}
