"""How each kind of torch operation hands the marks of its arguments on to its results (marks.py).

Operations that treat all vectors of a basis alike (views of other dimensions, sums of two vectors, products with a
number per token) hand a mark on; all others need the basis as it is.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from lightning_compress.modifiers.rotation.marks import AttentionValue, Mark, Marks
from lightning_compress.modifiers.rotation.spaces import Touch
from lightning_compress.modifiers.rotation.view_dimensions import keeps_last

__all__ = ["HANDLERS", "MAKERS", "VIEWS"]

Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]


def _argument(args: Args, kwargs: Kwargs, index: int, name: str, default: Any = None) -> Any:
    return args[index] if len(args) > index else kwargs.get(name, default)


def _linear(marks: Marks, name: str, args: Args, kwargs: Kwargs, out: Any) -> None:
    x, weight, bias = (_argument(args, kwargs, i, key) for i, key in enumerate(("input", "weight", "bias")))
    marks.multiply(x, weight, (-2, -1), bias, out)


def _addmm(marks: Marks, name: str, args: Args, kwargs: Kwargs, out: Any) -> None:
    marks.multiply(args[1], args[2], (-1, -2), args[0], out)


def _matmul(marks: Marks, name: str, args: Args, kwargs: Kwargs, out: Any) -> None:
    if marks.view(args[1]) is not None:
        marks.multiply(args[0], args[1], (-1, -2), None, out)
        return
    left, right = marks.get(args[0]), marks.get(args[1])  # attention weights times values
    marks.need_all(name, args, kwargs)
    mixed = _mixed(right, out) if left is None else None
    marks.attentions += mixed is not None
    marks.put_value(out, mixed)


def _attention(marks: Marks, name: str, args: Args, kwargs: Kwargs, out: Any) -> None:
    query, key, value = (_argument(args, kwargs, i, key) for i, key in enumerate(("query", "key", "value")))
    mark = marks.get(value)
    for x in (query, key, value):
        marks.need(x, "attention needs it as it is")
    marks.attentions += 1
    marks.put_value(out, _mixed(mark, out))


def _mixed(mark: Mark | None, out: Tensor) -> AttentionValue | None:
    """The values of a mark after a weighted sum over tokens; None where the output does not have their width."""
    if mark is None or mark.value is None or out.shape[-1] != mark.value.width:
        return None
    return replace(mark.value, mixed=True)


def _embedding(marks: Marks, name: str, args: Args, kwargs: Kwargs, out: Any) -> None:
    if (view := marks.view(_argument(args, kwargs, 1, "weight"))) is not None:
        space = marks.table_space(view.slot, out.shape[-1])
        space.root().sources.append(Touch(view.slot, view.dims[-1]))
        marks.put(out, Mark(space))


def _zeros(marks: Marks, name: str, args: Args, kwargs: Kwargs, out: Any) -> None:
    """Zeros lie in every space, and so in the one of what is added to them."""
    if out.ndim:
        marks.put(out, Mark(marks.new_space(out.shape[-1])))


def _like(marks: Marks, name: str, args: Args, kwargs: Kwargs, out: Any) -> None:
    """A tensor that is like another only in shape and dtype."""


def _reshaped(marks: Marks, name: str, args: Args, kwargs: Kwargs, out: Any) -> None:
    """The last dimension stays, or is split into heads."""
    x = _argument(args, kwargs, 0, "input")
    mark = marks.get(x)
    if mark is None or not isinstance(out, Tensor):
        marks.need_all(name, args, kwargs)
    elif out is x:
        pass
    elif keeps_last(name, x, args, kwargs, out):
        marks.put(out, mark)
    else:
        marks.need(x, f"{name} takes its features apart")
        marks.put_value(out, _heads(name, x, mark.value, args, out))


def _heads(name: str, x: Tensor, value: AttentionValue | None, args: Args, out: Tensor) -> AttentionValue | None:
    """Values that are cut into heads, or joined again."""
    if value is None:
        return None
    if name in ("view", "reshape", "unflatten", "flatten"):
        width = min(value.width, out.shape[-1])
        divides = value.width % width == 0 and out.shape[-1] % width == 0
        return replace(value, width=width, is_uncut=False) if divides else None
    if name == "getitem" and value.is_uncut and isinstance(args[1], tuple):
        last = args[1][-1]
        if isinstance(last, slice) and last.step in (None, 1) and args[1][0] is Ellipsis:
            start, stop, _ = last.indices(x.shape[-1])
            return value.rows(start, stop)
    return None


def _split(marks: Marks, name: str, args: Args, kwargs: Kwargs, out: Any) -> None:
    """split, chunk, unbind."""
    x, is_unbind = args[0], name == "unbind"
    mark, dim = marks.get(x), _argument(args, kwargs, 1 if is_unbind else 2, "dim", 0)
    if mark is None:
        marks.need_all(name, args, kwargs)
        return
    if dim % x.ndim != x.ndim - 1:
        for piece in out:
            marks.put(piece, mark)
        return
    marks.need(x, f"{name} takes its features apart")
    value = mark.value if mark.value is not None and mark.value.is_uncut and not is_unbind else None
    start = 0
    for piece in out:
        stop = start + (1 if is_unbind else piece.shape[-1])
        marks.put_value(piece, None if value is None else value.rows(start, stop))
        start = stop


def _sum(marks: Marks, name: str, args: Args, kwargs: Kwargs, out: Any) -> None:
    marks.unite(name, args[0], _argument(args, kwargs, 1, "other"), out)


def _scaled(marks: Marks, name: str, args: Args, kwargs: Kwargs, out: Any) -> None:
    """Times or divided by a number, or by one number for each token."""
    x, factor = args[0], _argument(args, kwargs, 1, "other")
    if marks.get(x) is None:
        x, factor = factor, x
    mark = marks.get(x)
    by_number = not isinstance(factor, Tensor) or factor.numel() == 1 or (factor.ndim > 0 and factor.shape[-1] == 1)
    if mark is None or not by_number or (name in ("div", "truediv") and x is not args[0]):
        marks.need_all(name, args, kwargs)
        marks.put(out, None)
    else:
        marks.need(factor, f"{name} needs it as it is")
        marks.put(out, replace(mark, value=None))


def _index_add(marks: Marks, name: str, args: Args, kwargs: Kwargs, out: Any) -> None:
    target, dim, source = args[0], args[1], _argument(args, kwargs, 3, "source")
    if isinstance(dim, int) and dim % target.ndim != target.ndim - 1 and isinstance(source, Tensor):
        marks.unite(name, target, source, out)
    else:
        marks.need_all(name, args, kwargs)
        marks.put(out, None)


def _cat(marks: Marks, name: str, args: Args, kwargs: Kwargs, out: Any) -> None:
    """Tensors of one space, joined along another dimension than the last."""
    tensors, dim = args[0], _argument(args, kwargs, 1, "dim", 0)
    if dim % out.ndim == out.ndim - 1 or any(marks.get(x) is None for x in tensors):
        marks.need_all(name, args, kwargs)
        marks.put(out, None)
        return
    for x in tensors:
        marks.unite(name, tensors[0], x, out)


VIEWS = frozenset({
    "to", "float", "half", "double", "bfloat16", "type", "type_as", "contiguous", "clone", "detach", "t", "transpose",
    "permute", "get", "T", "mT", "getitem", "view", "unsqueeze", "expand", "reshape",
})  # fmt: skip
"""Operations that make a view of a parameter, or a copy of one."""

_RESHAPES = (
    "to", "float", "half", "double", "bfloat16", "type", "type_as", "contiguous", "clone", "detach", "dropout", "alias",
    "unsqueeze", "squeeze", "expand", "expand_as", "repeat", "view", "reshape", "view_as", "flatten", "unflatten",
    "transpose", "swapaxes", "swapdims", "permute", "t", "get", "getitem", "repeat_interleave", "index_select",
    "narrow", "masked_fill", "cpu", "cuda",
)  # fmt: skip

HANDLERS: Mapping[str, Callable[[Marks, str, Args, Kwargs, Any], None]] = {
    "linear": _linear,
    "addmm": _addmm,
    **dict.fromkeys(("matmul", "mm", "bmm"), _matmul),
    **dict.fromkeys(_RESHAPES, _reshaped),
    **dict.fromkeys(("split", "chunk", "unbind", "tensor_split"), _split),
    **dict.fromkeys(("add", "sub"), _sum),
    **dict.fromkeys(("mul", "div", "truediv"), _scaled),
    **dict.fromkeys(("zeros_like", "new_zeros"), _zeros),
    **dict.fromkeys(("cat", "concat"), _cat),
    **dict.fromkeys(("new_ones", "ones_like", "new_full", "full_like", "new_tensor"), _like),
    "index_add": _index_add,
    "embedding": _embedding,
    "scaled_dot_product_attention": _attention,
}
"""By name of the operation; all others fix the spaces of their arguments."""

MAKERS = frozenset({"embedding", "linear", "addmm", "matmul", "mm", "zeros_like", "new_zeros",
                    "scaled_dot_product_attention"})  # fmt: skip
"""Operations that mark their output although no argument has a mark."""
