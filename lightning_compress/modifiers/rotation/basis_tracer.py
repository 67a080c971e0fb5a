"""Watch the torch functions of a run, and let each hand on the marks of its arguments (marks.py, operations.py)."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lightning_compress.modifiers.rotation.marks import Marks, ParameterView
from lightning_compress.modifiers.rotation.operations import HANDLERS, MAKERS, VIEWS
from lightning_compress.modifiers.rotation.view_dimensions import dims_of_view

__all__ = ["BasisTracer"]

IN_PLACE: Mapping[str, str] = {"radd": "add", "rmul": "mul", "iadd": "add", "isub": "sub", "imul": "mul",
                               "itruediv": "truediv"}  # fmt: skip


class BasisTracer(TorchFunctionMode):
    """Marks the tensors of the run inside its context.

    Args:
        model: The model that runs.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.marks = Marks(model)
        self.asleep = 0  # above 0 inside a normalization, which counts as one operation

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        out = func(*args, **kwargs)
        if not self.asleep:
            name = getattr(func, "__name__", "").strip("_")
            self._hand_on(IN_PLACE.get(name, name), args, kwargs, out)
        return out

    def _hand_on(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Hand marks on from the arguments of an operation to its results."""
        if name == "setitem":
            self.marks.unite(name, args[0], args[2], args[0])
            return
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if not outputs:
            if name in ("item", "tolist"):
                self.marks.need_all(name, args, kwargs)
            return
        if len(outputs) == 1 and args and name in VIEWS and self._is_parameter_view(name, args[0], outputs[0]):
            return
        marked = [x for x in tree_leaves((args, kwargs)) if self.marks.get(x) is not None]
        handler = HANDLERS.get(name)
        if handler is not None and (marked or name in MAKERS):
            handler(self.marks, name, args, kwargs, out)
        elif marked:
            self.marks.need_all(name, args, kwargs)
            for x in outputs:
                if not any(x is m for m in marked):
                    self.marks.put(x, None)

    def _is_parameter_view(self, name: str, x: Any, out: Tensor) -> bool:
        """Record ``out`` where it is a view of a parameter."""
        view = self.marks.view(x)
        dims = None if view is None else dims_of_view(name, x, out, view.dims)
        if view is None or dims is None:
            return False
        self.marks.put_view(out, ParameterView(view.slot, dims))
        return True
