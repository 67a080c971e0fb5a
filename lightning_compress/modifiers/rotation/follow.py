"""Follow one run of a model and record which dimensions of which parameters share a basis.

Every tensor of the run carries a mark: the :class:`Space` of its last dimension, the normalization that it has just
passed, and whether it is a value on its way through an attention. Linear maps by a parameter end one space and begin
another; operations that need a basis as it is fix the space, which records the first of them. There is no table of
architectures and no tracing: torch functions are watched as they run, so the spaces are those of this run.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lightning_compress.layers.weight_slice import WeightSlice
from lightning_compress.modifiers.rotation.marks import Marks, ParameterView
from lightning_compress.modifiers.rotation.norms import recognize
from lightning_compress.modifiers.rotation.operations import HANDLERS, MAKERS, VIEWS
from lightning_compress.modifiers.rotation.spaces import Norm
from lightning_compress.modifiers.rotation.view_dimensions import dims_of_view

__all__ = ["BasisTracer", "follow", "output_leaves"]

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


def follow(model: nn.Module, run: Callable[[], Any]) -> Marks:
    """Run the model once, in eval mode and without gradients, and record its spaces.

    Args:
        model: Model whose parameters are read and not changed.
        run: Calls the model once.
    """
    tracer = BasisTracer(model)
    with torch.no_grad(), _eager_experts(model), _module_hooks(model, tracer), tracer:
        output = run()
    for leaf in output_leaves(output):
        tracer.marks.need(leaf, "the model returns a vector of it")
    tracer.marks.close()
    return tracer.marks


def output_leaves(output: Any) -> list[Any]:
    """The logits of an output that has them, else all its leaves."""
    logits = getattr(output, "logits", None)
    return tree_leaves([logits] if isinstance(logits, Tensor) else dict(output) if hasattr(output, "keys") else output)


# -- the run ----------------------------------------------------------------------------------------------------------


@contextmanager
def _module_hooks(model: nn.Module, tracer: BasisTracer) -> Iterator[None]:
    """Record which module runs, and normalizations as one operation."""
    recognized: dict[tuple[str, int], Norm | None] = {}

    def norm_of(name: str, module: nn.Module, args: tuple[Any, ...]) -> Norm | None:
        if len(args) != 1 or not isinstance(args[0], Tensor) or not args[0].ndim or any(module.children()):
            return None
        key = (name, args[0].shape[-1])
        if key not in recognized:
            tracer.asleep += 1
            recognized[key] = None  # for the call that recognize makes
            try:
                recognized[key] = recognize(name, module, args[0].shape[-1], args[0].device)
            finally:
                tracer.asleep -= 1
        return recognized[key]

    def enter(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not tracer.asleep:
            if norm_of(name, module, args) is not None:
                tracer.asleep += 1
            tracer.marks.inside.append(name)

    def leave(name: str, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        norm = norm_of(name, module, args) if tracer.marks.inside and tracer.marks.inside[-1] == name else None
        if norm is not None:
            tracer.asleep -= 1
            tracer.marks.normalize(norm, args[0], out)
        if not tracer.asleep:
            tracer.marks.inside.pop()

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, WeightSlice):  # with a hook it would run beside its parameter, or instead of it
            continue
        handles.append(module.register_forward_pre_hook(lambda m, args, name=name: enter(name, m, args), prepend=True))
        handles.append(module.register_forward_hook(lambda m, args, out, name=name: leave(name, m, args, out)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _eager_experts(model: nn.Module) -> Iterator[None]:
    """Mixtures of transformers run one product for each expert, instead of one for all."""
    key = "_experts_implementation_internal"
    before: list[tuple[Any, Any]] = []
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and getattr(config, key, None) is not None and not any(c is config for c, _ in before):
            before.append((config, getattr(config, key)))
    for config, _ in before:
        setattr(config, key, "eager")
    try:
        yield
    finally:
        for config, value in before:
            setattr(config, key, value)
