"""What is turned by what: the rotations that were asked for, by the spaces and heads that a run has shown.

R1   spaces that begin with embeddings                       in the weights
R2   values of heads                                         in the weights
R4   inputs of what writes the residual stream and is fed    beside the module
by neither of them: the second half of an MLP
v    the inputs of all targets: R1 and R2 where they reach,  in the weights
and the others                                          beside the module
u    the outputs of all targets, likewise
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Generator, Tensor, nn

from lightning_compress.layers.matrix import is_supported
from lightning_compress.modifiers.rotation.basis_tracer import Linear
from lightning_compress.modifiers.rotation.discover import heads_of, streams_of
from lightning_compress.modifiers.rotation.follow import Followed
from lightning_compress.modifiers.rotation.fuse import Turn, turns_of_heads, turns_of_space
from lightning_compress.modifiers.rotation.hadamard import (
    check_order,
    hadamard,
    random_hadamard,
    random_orthogonal,
    random_signs,
)
from lightning_compress.modifiers.rotation.online import OnlineRotation, OnlineRotations
from lightning_compress.modifiers.rotation.spaces import Norm, Space, Touch

__all__ = ["Matrices", "Plan", "make_plan", "put_beside"]

Kind = Literal["hadamard", "random-hadamard", "random-matrix"]
Side = Literal["input", "output"]


@dataclass
class Plan:
    """What is to be done.

    Args:
        turns: In the weights.
        norms: Whose gains are folded in, with the R of their space.
        beside: What runs beside modules, by name.
        streams: The spaces of R1, with their R.
    """

    turns: list[Turn] = field(default_factory=list)
    norms: list[tuple[Norm, Tensor]] = field(default_factory=list)
    beside: dict[str, list[OnlineRotation]] = field(default_factory=dict)
    streams: list[tuple[Space, Tensor]] = field(default_factory=list)

    def swap(self, R: Tensor, better: Tensor) -> None:
        """Turn by ``better`` whatever was to be turned by R."""
        self.turns = [Turn(turn.touch, better) if turn.matrix is R else turn for turn in self.turns]
        self.norms = [(norm, better if old is R else old) for norm, old in self.norms]
        self.streams = [(space, better if old is R else old) for space, old in self.streams]


class Matrices:
    """Makes R for a rotation of some size, one after the other from one seed.

    Args:
        kind: What matrices.
        block: Features that are rotated among themselves; None: all.
        seed: Of signs and matrices.
    """

    def __init__(self, kind: Kind, block: int | None, seed: int):
        self.kind, self.block, self.generator = kind, block, Generator().manual_seed(seed)

    def __call__(self, rotation: str, size: int, keep_mean: bool = False) -> Tensor:
        """R [h, h] float64; h is ``size`` or the block.

        Raises:
            ValueError: The block does not divide the size, or there is no Hadamard matrix.
        """
        block = self._block(rotation, size)
        if self.kind == "random-matrix":
            return random_orthogonal(block, self.generator, keep_mean=keep_mean)
        self._check(rotation, size, block)
        if self.kind == "hadamard" and not keep_mean:
            return hadamard(block) / block**0.5
        return random_hadamard(block, self.generator, keep_mean=keep_mean)

    def signs(self, rotation: str, size: int) -> tuple[int, ...]:
        """Of a rotation that runs beside a module: always a Hadamard matrix, for speed."""
        block = self._block(rotation, size)
        self._check(rotation, size, block)
        if self.kind == "hadamard":
            return (1,) * block
        return tuple(int(sign) for sign in random_signs(block, self.generator))

    def _block(self, rotation: str, size: int) -> int:
        block = min(self.block or size, size)
        if size % block:
            raise ValueError(f"transform_block_size={block} does not divide the {size} features of {rotation}")
        return block

    def _check(self, rotation: str, size: int, block: int) -> None:
        try:
            check_order(block)
        except ValueError as error:
            other = ", or transform_type='random-matrix', which has every size" if rotation in ("R1", "R2") else ""
            raise ValueError(f"{rotation} rotates {size} features: {error}; set transform_block_size{other}") from None


def make_plan(
    model: nn.Module,
    followed: Followed,
    rotations: Collection[str],
    targets: Callable[[], Mapping[str, nn.Module]],
    matrices: Matrices,
    allow_online: bool,
) -> Plan:
    """What to turn.

    Args:
        model: Is looked at only.
        followed: What a run of it showed.
        rotations: Of R1, R2, R4, v, u.
        targets: Modules of v and u, by name.
        matrices: Makes them.
        allow_online: Rotations may run beside modules.

    Raises:
        ValueError: It cannot be done; what stands in the way is named.
    """
    plan = Plan()
    everywhere = "v" in rotations or "u" in rotations
    if "R1" in rotations or (everywhere and _possible(streams_of, followed, model)):
        for stream in streams_of(followed, model):
            R = matrices("R1", stream.size, stream.centered)
            plan.turns += turns_of_space(stream, R)
            plan.norms += [(norm, R) for norm in stream.norms]
            plan.streams.append((stream, R))
    if "R2" in rotations or (everywhere and _possible(heads_of, followed, model)):
        plan.turns += turns_of_heads(heads_of(followed, model), lambda head: matrices("R2", head.size))
    if "R4" in rotations:
        fed = [linear for linear in followed.linears if _is_fed_otherwise(linear)]
        if not fed:
            raise ValueError("R4: nothing writes the residual stream from inputs of its own; leave R4 out")
        _beside(plan, model, "R4", "input", fed, matrices)
    sides: dict[str, Side] = {"v": "input", "u": "output"}
    for name in [name for name in sides if name in rotations]:
        chosen = set(targets().values())
        asked = [linear for linear in followed.linears if model.get_submodule(linear.module) in chosen]
        _beside(plan, model, name, sides[name], asked, matrices)
    if plan.beside and not allow_online:
        names = list(plan.beside)
        raise ValueError(
            f"{'+'.join(rotations)}: no weight can take in the rotation beside {len(names)} modules, such as "
            f"{', '.join(names[:3])}, and no other loader runs it there (transformers 5.23 would compute something "
            f"else); take rotations=['R1', 'R2'], or set allow_online=True: then only lightning_compress.load loads it"
        )
    return plan


def put_beside(model: nn.Module, beside: Mapping[str, list[OnlineRotation]]) -> Callable[[], None]:
    """Attach what runs beside modules; the function that is returned takes it off."""
    modules = {name: model.get_submodule(name) for name in beside}
    for name, rotations in beside.items():
        before = OnlineRotations.of(modules[name])
        sides = {rotation.side: rotation for rotation in (*(before.rotations if before else ()), *rotations)}
        OnlineRotations(tuple(sides.values())).attach(modules[name])

    def take_off() -> None:
        for module in modules.values():
            OnlineRotations.detach(module)

    return take_off


def _is_fed_otherwise(linear: Linear) -> bool:
    """It writes the residual stream, and its inputs are neither of the stream nor values of heads."""
    into, out_of = linear.output_space.root(), linear.input_space
    return not into.fixed and bool(into.sources) and not linear.head and (out_of is None or bool(out_of.root().fixed))


def _beside(plan: Plan, model: nn.Module, rotation: str, side: Side, linears: list[Linear], matrices: Matrices) -> None:
    """Add rotations beside those of ``linears`` whose side no weight turns already."""
    turned = {(turn.touch.slot, turn.touch.dim) for turn in plan.turns}
    for linear in linears:
        touches = (linear.reads,) if side == "input" else linear.writes
        if (touches[0].slot, touches[0].dim) in turned:
            continue
        module = model.get_submodule(linear.module)
        if not is_supported(module) or touches[0].slot.module != linear.module:
            raise ValueError(
                f"{rotation}: {touches[0].slot.name!r} is no module of its own (experts in one tensor), so that "
                f"nothing can rotate its {side}; leave {rotation} out"
            )
        records = plan.beside.setdefault(linear.module, [])
        if any(record.side == side for record in records):
            continue  # it is called several times
        size = touches[0].slot.of(model).shape[touches[0].dim]
        online = OnlineRotation(side, matrices.signs(rotation, size))
        records.append(online)
        M = online.matrix()
        plan.turns += [Turn(Touch(touch.slot, touch.dim), M) for touch in touches]


def _possible(find: Callable[[Followed, nn.Module], object], followed: Followed, model: nn.Module) -> bool:
    try:
        find(followed, model)
    except ValueError:
        return False
    return True
