"""Weights of modules that are not Linears, each seen as one: those of LSTM, GRU, RNN, their cells, MultiheadAttention.

    encoder.weight_ih_l0 [4H, C]                 encoder.ih_l0          hook, solver, record and packed codes are here
    encoder.weight_hh_l0_reverse [4H, H]         encoder.hh_l0_reverse
    attention.in_proj_weight [3E, E]             attention.q_proj, attention.k_proj, attention.v_proj: E rows each
    attention.q_proj_weight [E, E] ...           the same names, where keys and values have other sizes

The module gets a child for each weight (a :class:`ModuleWeight`) when a target of a modifier matches it
(:func:`reveal`), and loses those that carry neither a record nor a parametrization (:func:`hide`). No weight is copied
and no parameter is added.

A module calls none of its children: it runs its own code on its parameters. Where a child has a hook, the module first
calls it on what its weight multiplies in this pass (layers/open_forward.py), and the result is not used.
"""

import re
import warnings
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_compress.layers.home_parametrization import RowSlices, add_step, has_steps, remove_step, restore_home
from lightning_compress.layers.open_forward import show_inputs
from lightning_compress.layers.records import has_record
from lightning_compress.layers.weight_slice import WeightSlice

__all__ = [
    "HOMES", "ModuleWeight", "all_weights", "hide", "put_on_weight", "remove_weights", "restore_weights", "reveal",
    "take_off_weight", "weights_inside",
]  # fmt: skip

HOMES = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
"""Modules with matrices of their own that this file sees as Linears."""

_RECURRENT = re.compile(r"weight_((?:ih|hh|hr)(?:_l\d+)?(?:_reverse)?)")
_BEFORE = "_lightning_compress_forward_before"
_SEPARATE = ("q_proj", "k_proj", "v_proj")


class ModuleWeight(WeightSlice):
    """``y = x W^T`` with W some rows of a parameter of ``home``.

    Args:
        home: The module with the parameter.
        fused: Name of the parameter, a matrix.
        rows: First and last row plus one.
    """

    def __init__(self, home: nn.Module, fused: str, rows: tuple[int, int]):
        super().__init__(home, fused, (rows[1] - rows[0], home.get_parameter(fused).shape[1]))
        self.rows = rows

    @property
    def key(self) -> str:
        return str(self.rows[0])

    def slice_of(self, fused: Tensor) -> Tensor:
        return fused if self.rows == (0, len(fused)) else fused[slice(*self.rows)]


def weights_inside(home: nn.Module) -> dict[str, ModuleWeight]:
    """The children of a module that :func:`reveal` made, by local name."""
    return {name: child for name, child in home._modules.items() if isinstance(child, ModuleWeight)}


def all_weights(home: nn.Module) -> dict[str, ModuleWeight]:
    """A child for each weight of a module, by local name; those that :func:`reveal` made, and new ones."""
    return {**_weights_of(home), **weights_inside(home)} if isinstance(home, HOMES) else {}


def reveal(model: nn.Module, matches: Callable[[str, nn.Module], bool] | None = None) -> None:
    """Give modules a child for each of their weights.

    Args:
        model: A model of any kind.
        matches: By name and module, which of these modules, or of their weights, are wanted; one weight of a module
            brings the others. None: all.
    """
    for name, home in list(model.named_modules()):
        if not isinstance(home, HOMES):
            continue
        inside = all_weights(home)
        candidates = {name: home, **{f"{name}.{local}".removeprefix("."): weight for local, weight in inside.items()}}
        if matches is not None and not any(matches(path, module) for path, module in candidates.items()):
            continue
        for local, weight in inside.items():
            home.add_module(local, weight.train(home.training))
        _divert(home)
        if matches is not None and (computed := _computed(home, inside)):
            warnings.warn(
                f"{', '.join(computed)} of {name!r} ({type(home).__name__}) cannot be compressed and is left as it is: "
                f"it is not a Parameter, as after weight_norm; remove what computes it first",
                stacklevel=4,
            )


def hide(model: nn.Module) -> None:
    """Remove the children again that carry no record and no parametrization."""
    for home in model.modules():
        for local, weight in weights_inside(home).items() if isinstance(home, HOMES) else ():
            if weight.step is None and not has_record(weight):
                delattr(home, local)
        if isinstance(home, HOMES) and not has_steps(home):
            _return(home)


def remove_weights(home: nn.Module) -> None:
    """Remove the children of a module, whatever they carry."""
    for local in weights_inside(home):
        delattr(home, local)
    _return(home)


def put_on_weight(weight: ModuleWeight, step: nn.Module) -> None:
    """Let a weight pass through a step in every forward pass."""
    home = weight.home
    if "parametrizations" in home._modules and not weight_steps_only(home):
        raise ValueError(
            f"a {type(home).__name__} has a parametrization on another of its weights; remove it first "
            f"(torch.nn.utils.parametrize.remove_parametrizations), or add the module to ignore"
        )
    rows = weight.out_features
    add_step(weight, RowSlices([rows] * (len(weight.whole) // rows)), step)
    _divert(home)
    if isinstance(home, nn.RNNBase):
        home.__dict__["_init_flat_weights"] = MethodType(_init_flat_weights, home)
        home.__dict__["_update_flat_weights"] = MethodType(_leave_flat_weights, home)


def take_off_weight(weight: ModuleWeight, leave_parametrized: bool) -> None:
    """Remove the step of a weight; ``leave_parametrized``: it keeps the value that the step gave it."""
    remove_step(weight, leave_parametrized)
    if not has_steps(weight.home):
        restore_weights(weight.home)


def restore_weights(home: nn.Module) -> None:
    """Make the parametrized weights of a module ordinary parameters again, the same objects."""
    restore_home(home)
    _return(home)
    for name in ("_init_flat_weights", "_update_flat_weights"):
        home.__dict__.pop(name, None)
    if isinstance(home, nn.RNNBase):
        home._init_flat_weights()


def weight_steps_only(home: nn.Module) -> bool:
    """Whether all parametrizations of a module are those of :func:`put_on_weight`."""
    parts = [part for parts in home.get_submodule("parametrizations").children() for part in parts.children()]
    return all(isinstance(part, RowSlices) for part in parts)


def _weights_of(home: nn.Module) -> dict[str, ModuleWeight]:
    """New children, for weights that are plain parameters."""
    matrices = {name: p for name, p in home._parameters.items() if p is not None and p.ndim == 2}
    if not isinstance(home, nn.MultiheadAttention):
        named = {name: _RECURRENT.fullmatch(name) for name in matrices}
        return {m[1]: ModuleWeight(home, name, (0, len(matrices[name]))) for name, m in named.items() if m}
    if "in_proj_weight" in matrices:
        E = len(matrices["in_proj_weight"]) // 3
        starts = zip(_SEPARATE, (0, E, 2 * E), strict=True)
        return {local: ModuleWeight(home, "in_proj_weight", (row, row + E)) for local, row in starts}
    separate = {local: f"{local}_weight" for local in _SEPARATE}
    return {n: ModuleWeight(home, full, (0, len(matrices[full]))) for n, full in separate.items() if full in matrices}


def _computed(home: nn.Module, inside: dict[str, ModuleWeight]) -> list[str]:
    """Names of the weights of a recurrent module that are no parameters."""
    names = getattr(home, "_flat_weights_names", ())
    reached = {weight.fused for weight in inside.values()}
    return [name for name in names if _RECURRENT.fullmatch(name) and name not in reached]


def _is_hooked(home: nn.Module) -> bool:
    called = [*weights_inside(home).values(), *([home.out_proj] if isinstance(home, nn.MultiheadAttention) else [])]
    return any(layer._forward_pre_hooks or layer._forward_hooks for layer in called)


def _divert(home: nn.Module) -> None:
    """Let calls of the module go through :func:`_forward`."""
    if not _is_diverted(home):
        if "forward" in home.__dict__:  # such as accelerate puts there
            home.__dict__[_BEFORE] = home.__dict__["forward"]
        home.__dict__["forward"] = MethodType(_forward, home)


def _return(home: nn.Module) -> None:
    """Undo :func:`_divert`."""
    if _is_diverted(home):
        del home.__dict__["forward"]
        if _BEFORE in home.__dict__:
            home.__dict__["forward"] = home.__dict__.pop(_BEFORE)


def _is_diverted(home: nn.Module) -> bool:
    return getattr(home.__dict__.get("forward"), "__func__", None) is _forward


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward pass of the module, its children called before it where one has a hook."""
    if _is_hooked(self):
        show_inputs(self, weights_inside(self), *args, **kwargs)
    native = self.__dict__.get(_BEFORE) or MethodType(type(self).forward, self)
    if not has_steps(self):
        return native(*args, **kwargs)
    with parametrize.cached():
        if not isinstance(self, nn.RNNBase):
            return native(*args, **kwargs)
        originals = self._flat_weights
        self._flat_weights = [getattr(self, name) for name in self._flat_weights_names]
        try:
            return native(*args, **kwargs)
        finally:
            self._flat_weights = originals


def _init_flat_weights(self: Any) -> None:
    """As torch's after a move of the module, but of the parameters: computed tensors would hold a graph."""
    lists = self._modules["parametrizations"]._modules
    names = self._flat_weights_names
    self._flat_weights = [lists[n].original if n in lists else getattr(self, n, None) for n in names]
    self.flatten_parameters()


def _leave_flat_weights(self: Any) -> None:
    """In place of torch's look for changed weights: outside of a forward pass, as in copies, the parameters stay."""
