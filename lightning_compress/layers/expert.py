"""One projection of one expert: a Linear whose weight is a slice of the tensor that holds all experts.

Shapes: E experts, F rows of the fused tensor [E, F, C] (gate above up), R rows and C columns of the slice.
"""

from torch import Tensor, nn

from lightning_compress.layers.weight_slice import WeightSlice

__all__ = ["ExpertLinear", "mark_tokens", "tokens_of"]

_TOKENS = "_lightning_compress_tokens"


class ExpertLinear(WeightSlice):
    """``y = x W^T`` with W = fused[expert, rows].

    Args:
        home: The module with the fused tensor; it is not a submodule of this one.
        fused: Name of that tensor there, [E, F, C].
        expert: Index of the expert.
        rows: First and last row plus one, inside of F.
    """

    def __init__(self, home: nn.Module, fused: str, expert: int, rows: tuple[int, int]):
        super().__init__(home, fused, (rows[1] - rows[0], home.get_parameter(fused).shape[-1]))
        self.expert, self.rows = expert, rows

    @property
    def key(self) -> str:
        return f"{self.expert}_{self.rows[0]}"

    def slice_of(self, fused: Tensor) -> Tensor:
        return fused[self.expert, slice(*self.rows)]


def mark_tokens(x_NC: Tensor, tokens_N: Tensor) -> Tensor:
    """Note on ``x_NC`` which tokens of the batch its rows are (int64, places in the flattened batch)."""
    setattr(x_NC, _TOKENS, tokens_N)
    return x_NC


def tokens_of(x_NC: Tensor) -> Tensor | None:
    """The tokens that :func:`mark_tokens` noted, or None."""
    return getattr(x_NC, _TOKENS, None)
