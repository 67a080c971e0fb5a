"""One projection of one expert: a Linear whose weight is a slice of the tensor that holds all experts.

It owns no parameter. The fused tensor stays the only one, so that the keys of ``state_dict``, the optimizer and the
number of parameters are those of the dense model; values written into the slice are written into that tensor.

Shapes: E experts, F rows of the fused tensor [E, F, C] (gate above up), R rows and C columns of the slice.
"""

from typing import Any

from torch import Tensor, nn

__all__ = ["ExpertLinear", "mark_tokens", "owner_of", "tokens_of"]

_TOKENS = "_lightning_compress_tokens"


class ExpertLinear(nn.Linear):
    """``y = x W^T`` with W = fused[expert, rows].

    Args:
        home: The module with the fused tensor; it is not a submodule of this one.
        fused: Name of that tensor there, [E, F, C].
        expert: Index of the expert.
        rows: First and last row plus one, inside of F.
    """

    def __init__(self, home: nn.Module, fused: str, expert: int, rows: tuple[int, int]):
        nn.Module.__init__(self)
        self._home: tuple[nn.Module, str] = (home, fused)  # a tuple, so that it does not become a submodule
        self.fused, self.expert, self.rows = fused, expert, rows
        self.in_features, self.out_features = home.get_parameter(fused).shape[-1], rows[1] - rows[0]
        self.register_parameter("bias", None)

    value: Tensor | None = None
    """The weight while it is computed once for a forward pass; see layers/expert_slices.py."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The slice [R, C], a view of the fused tensor as it is now, or the value that a step computes from it."""
        if self.value is not None:
            return self.value
        piece, step = self.slice_of(self.whole), self.step
        value: Tensor = piece if step is None else step(piece)
        return value

    @property
    def home(self) -> nn.Module:
        """The module with the fused tensor."""
        return self._home[0]

    @property
    def key(self) -> str:
        """The name of this slice among those of the fused tensor."""
        return f"{self.expert}_{self.rows[0]}"

    @property
    def whole(self) -> nn.Parameter:
        """The fused tensor [E, F, C]; the original where it is parametrized."""
        parts = self._parts
        return self.home.get_parameter(self.fused) if parts is None else parts.get_parameter("original")

    @property
    def slices(self) -> nn.Module | None:
        """The parametrization of the fused tensor by steps of its slices (layers/expert_slices.py), or None."""
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

    def slice_of(self, fused: Tensor) -> Tensor:
        """The slice [R, C] of this expert in a tensor with the layout of the fused one."""
        return fused[self.expert, slice(*self.rows)]

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = super().__call__(x, *args, **kwargs)
        return result


def owner_of(module: nn.Module) -> nn.Module:
    """The module that holds the parameter of a layer: itself, or of an expert the one with the fused tensor."""
    return module.home if isinstance(module, ExpertLinear) else module


def mark_tokens(x_NC: Tensor, tokens_N: Tensor) -> Tensor:
    """Note on ``x_NC`` which tokens of the batch its rows are (int64, places in the flattened batch)."""
    setattr(x_NC, _TOKENS, tokens_N)
    return x_NC


def tokens_of(x_NC: Tensor) -> Tensor | None:
    """The tokens that :func:`mark_tokens` noted, or None."""
    return getattr(x_NC, _TOKENS, None)
