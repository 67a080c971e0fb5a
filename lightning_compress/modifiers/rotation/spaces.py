"""A space: all tensors of a model whose last dimension must be seen in one and the same basis, and who touches it.

The residual stream is one. A model computes the same after the basis has been turned, x -> x R, if every weight that
makes such a vector gives x R, and every weight that takes one expects it.
"""

from dataclasses import dataclass, field
from itertools import chain

from torch import Tensor, nn

__all__ = ["Head", "Norm", "Slot", "Space", "Touch", "owner_of"]


@dataclass(frozen=True)
class Slot:
    """A parameter where it hangs: dotted name of the module, and the attribute."""

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
    """A normalization over the last dimension, as it was recognized from what it computes.

    Args:
        module: Its dotted name.
        centered: LayerNorm, which takes the mean off; else RMSNorm.
        gain: The parameter g; None where there is none.
        offset: 1 where the gain is 1 + parameter, else 0.
        bias: The parameter added last; None where there is none.
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
        dim: Which of its dimensions, counted from 0.
        norm: What the vectors pass before this parameter multiplies them.
        start: First index along ``dim``.
        stop: One past the last; None: to the end.
    """

    slot: Slot
    dim: int
    norm: Norm | None = None
    start: int = 0
    stop: int | None = None


@dataclass
class Space:
    """Who touches it. Two spaces become one when tensors of theirs are added.

    Args:
        size: Its dimension n.
        sources: Tables of embeddings and parameters that are added: their rows are vectors of it.
        writers: Weights (and biases) whose output is a vector of it.
        readers: Weights that multiply its vectors.
        norms: Normalizations of its vectors.
        fixed: Why its basis cannot be turned, said by the first who needs it as it is; empty: it can.
    """

    size: int
    sources: list[Touch] = field(default_factory=list)
    writers: list[Touch] = field(default_factory=list)
    readers: list[Touch] = field(default_factory=list)
    norms: list[Norm] = field(default_factory=list)
    fixed: str = ""
    _one_with: "Space | None" = None

    def root(self) -> "Space":
        """The space that it has become part of; itself when there is none."""
        space = self
        while space._one_with is not None:
            space = space._one_with
        return space

    def join(self, other: "Space") -> None:
        """Both are one from now on."""
        one, two = self.root(), other.root()
        if one is not two:
            for name in ("sources", "writers", "readers", "norms"):
                getattr(one, name).extend(getattr(two, name))
            one.fixed = one.fixed or two.fixed
            two._one_with = one

    def fix(self, reason: str) -> None:
        """Its basis stays as it is."""
        root = self.root()
        root.fixed = root.fixed or reason

    @property
    def centered(self) -> bool:
        """True when a LayerNorm reads it."""
        return any(norm.centered for norm in self.norms)

    @property
    def touches(self) -> list[Touch]:
        """All of them, each once."""
        return list(dict.fromkeys([*self.sources, *self.writers, *self.readers]))


@dataclass(frozen=True)
class Head:
    """Values of an attention: rows of one weight that are mixed over tokens, head by head, and then multiplied.

    Args:
        value: The rows of the value projection; one touch for its weight, one for its bias.
        output: The columns of the output projection.
        size: Width of a head.
    """

    value: tuple[Touch, ...]
    output: Touch
    size: int


def owner_of(model: nn.Module, parameter: Tensor, inside: list[str]) -> Slot | None:
    """Where a parameter hangs, looked for in the modules that run, from the inside out; then anywhere."""
    for name in chain(reversed(inside), (name for name, _ in model.named_modules())):  # nearly always inside
        for attribute, candidate in model.get_submodule(name)._parameters.items():
            if candidate is parameter:
                return Slot(name, attribute)
    return None
