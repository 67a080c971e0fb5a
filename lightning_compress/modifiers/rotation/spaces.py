"""A space: all tensors of a model whose last dimension has one basis, and the parameters that touch it.

The residual stream is one. A model computes the same after the basis is turned, x -> x R, if every weight that writes
such a vector writes x R, and every weight that reads one expects x R.
"""

from dataclasses import dataclass, field
from itertools import chain

from torch import Tensor, nn

__all__ = ["Head", "Norm", "Slot", "Space", "Touch", "owner_of"]


@dataclass(frozen=True)
class Slot:
    """The place of a parameter: dotted name of its module, and the attribute."""

    module: str
    attribute: str

    @property
    def name(self) -> str:
        return f"{self.module}.{self.attribute}" if self.module else self.attribute

    def of(self, model: nn.Module) -> nn.Parameter:
        parameter = model.get_submodule(self.module)._parameters[self.attribute]
        assert parameter is not None
        return parameter


@dataclass(frozen=True)
class Norm:
    """A normalization over the last dimension, recognized by what it computes.

    Args:
        module: Dotted name of the module.
        centered: True for LayerNorm, which subtracts the mean; False for RMSNorm.
        gain: The parameter g; None where there is none.
        offset: 1 where the gain is 1 + parameter, else 0.
        bias: The parameter that is added last; None where there is none.
    """

    module: str
    centered: bool
    gain: Slot | None
    offset: int
    bias: Slot | None

    def gain_of(self, model: nn.Module) -> Tensor | None:
        """g [n] in float64, on the CPU; None where there is none."""
        return None if self.gain is None else self.gain.of(model).detach().double().cpu() + self.offset


@dataclass(frozen=True)
class Touch:
    """One dimension of a parameter lies in a space.

    Args:
        slot: The parameter.
        dim: Index of the dimension.
        norm: Normalization of the vectors before this parameter multiplies them.
        start: First index along ``dim``.
        stop: Index behind the last one; None: to the end.
    """

    slot: Slot
    dim: int
    norm: Norm | None = None
    start: int = 0
    stop: int | None = None


@dataclass
class Space:
    """The parameters that touch one basis. Two spaces become one when vectors of both are added.

    Args:
        size: Dimension n of the space.
        sources: Tables of embeddings and parameters that are added: their rows are vectors of the space.
        writers: Weights (and biases) whose output is a vector of the space.
        readers: Weights that multiply vectors of the space.
        norms: Normalizations of vectors of the space.
        fixed: Reason why the basis cannot be turned, from the first operation that needs it as it is; else empty.
    """

    size: int
    sources: list[Touch] = field(default_factory=list)
    writers: list[Touch] = field(default_factory=list)
    readers: list[Touch] = field(default_factory=list)
    norms: list[Norm] = field(default_factory=list)
    fixed: str = ""
    _merged_into: "Space | None" = None

    def root(self) -> "Space":
        """The space that this one was merged into, or itself."""
        space = self
        while space._merged_into is not None:
            space = space._merged_into
        return space

    def join(self, other: "Space") -> None:
        """Make both spaces one."""
        one, two = self.root(), other.root()
        if one is not two:
            for name in ("sources", "writers", "readers", "norms"):
                getattr(one, name).extend(getattr(two, name))
            one.fixed = one.fixed or two.fixed
            two._merged_into = one

    def fix(self, reason: str) -> None:
        """Keep the basis as it is."""
        root = self.root()
        root.fixed = root.fixed or reason

    @property
    def centered(self) -> bool:
        """True when a LayerNorm normalizes its vectors."""
        return any(norm.centered for norm in self.norms)

    @property
    def touches(self) -> list[Touch]:
        """All touches, each once."""
        return list(dict.fromkeys([*self.sources, *self.writers, *self.readers]))


@dataclass(frozen=True)
class Head:
    """Values of an attention: rows of one weight that are mixed over tokens, head by head, and then multiplied.

    Args:
        value: Rows of the value projection; one touch for its weight, one for its bias.
        output: Columns of the output projection.
        size: Width of a head.
    """

    value: tuple[Touch, ...]
    output: Touch
    size: int


def owner_of(model: nn.Module, parameter: Tensor, inside: list[str]) -> Slot | None:
    """The slot of a parameter: searched in the modules that run, innermost first, then in all others."""
    for name in chain(reversed(inside), (name for name, _ in model.named_modules())):  # nearly always inside
        for attribute, candidate in model.get_submodule(name)._parameters.items():
            if candidate is parameter:
                return Slot(name, attribute)
    return None
