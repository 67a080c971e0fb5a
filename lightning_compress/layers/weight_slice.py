"""A Linear whose weight is a part of a parameter of another module.

It owns no parameter. The parameter of its home stays the only one, so that the keys of ``state_dict``, the optimizer
and the number of parameters are those of the dense model; values written into the slice are written into that
parameter.

Shapes: R rows and C columns of the slice.
"""

from typing import Any

from torch import Tensor, nn

__all__ = ["WeightSlice", "owner_of"]


class WeightSlice(nn.Linear):
    """``y = x W^T`` with W a slice of a parameter of ``home``; subclasses say which.

    Args:
        home: The module with the parameter; it is not a submodule of this one.
        fused: Name of the parameter there.
        shape: R and C.
    """

    def __init__(self, home: nn.Module, fused: str, shape: tuple[int, int]):
        nn.Module.__init__(self)
        self._home: tuple[nn.Module, str] = (home, fused)  # a tuple, so that it does not become a submodule
        self.fused = fused
        self.out_features, self.in_features = shape
        self.register_parameter("bias", None)

    value: Tensor | None = None
    """The weight while it is computed once for a forward pass; see layers/expert_slices.py."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The slice [R, C], a view of the parameter as it is now, or the value that a step computes from it."""
        if self.value is not None:
            return self.value
        piece, step = self.slice_of(self.whole), self.step
        value: Tensor = piece if step is None else step(piece)
        return value

    @property
    def home(self) -> nn.Module:
        """The module with the parameter."""
        return self._home[0]

    @property
    def key(self) -> str:
        """The name of this slice among those of the parameter."""
        raise NotImplementedError

    def slice_of(self, fused: Tensor) -> Tensor:
        """The slice [R, C] in a tensor with the layout of the parameter."""
        raise NotImplementedError

    @property
    def whole(self) -> nn.Parameter:
        """The parameter; the original where it is parametrized."""
        parts = self._parts
        return self.home.get_parameter(self.fused) if parts is None else parts.get_parameter("original")

    @property
    def slices(self) -> nn.Module | None:
        """The parametrization of the parameter by steps of its slices (layers/expert_slices.py), or None."""
        parts = self._parts
        return None if parts is None else parts.get_submodule("0")

    @property
    def step(self) -> nn.Module | None:
        """The step that computes this weight from its slice, or None."""
        slices = self.slices
        return None if slices is None else slices.get_submodule("steps")._modules.get(self.key)

    @property
    def _parts(self) -> nn.Module | None:
        lists = self.home._modules.get("parametrizations")
        return None if lists is None else lists._modules.get(self.fused)

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = super().__call__(x, *args, **kwargs)
        return result


def owner_of(module: nn.Module) -> nn.Module:
    """The module that holds the parameter of a layer: itself, or of a slice its home."""
    return module.home if isinstance(module, WeightSlice) else module
