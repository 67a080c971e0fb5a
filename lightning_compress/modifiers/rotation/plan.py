"""The plan of a rotation: the weights that each rotation turns, by the spaces and heads of a traced run.

    R1   in the weights: spaces that begin with embeddings
    R2   in the weights: values of heads
    R4   online, beside a module: inputs of products that write the residual stream and read neither it nor values of
         heads, the second half of an MLP
    v    inputs of all targets: by R1 and R2 in the weights where they reach, online for the others
    u    outputs of all targets, likewise

Online rotations run at every call of a module (online.py).
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Generator, Tensor, nn

from lightning_compress.layers.matrix import is_supported
from lightning_compress.modifiers.rotation.discover import heads_of, streams_of
from lightning_compress.modifiers.rotation.fuse import Turn, turns_of_heads
from lightning_compress.modifiers.rotation.hadamard import (
    check_order,
    hadamard,
    random_hadamard,
    random_orthogonal,
    random_signs,
)
from lightning_compress.modifiers.rotation.marks import Marks, Product
from lightning_compress.modifiers.rotation.online import OnlineRotation, OnlineRotations
from lightning_compress.modifiers.rotation.spaces import Norm, Space, Touch

__all__ = ["Matrices", "RotationPlan", "attach_online", "make_plan"]

Kind = Literal["hadamard", "random-hadamard", "random-matrix"]
Side = Literal["input", "output"]


@dataclass
class RotationPlan:
    """The rotations of a model.

    Args:
        turns: Rotations that are written into the weights.
        norms: Normalizations whose gains are folded in, with the R of their space.
        online: Rotations that run at every call of a module, by its name.
        streams: Spaces of R1, with their R.
    """

    turns: list[Turn] = field(default_factory=list)
    norms: list[tuple[Norm, Tensor]] = field(default_factory=list)
    online: dict[str, list[OnlineRotation]] = field(default_factory=dict)
    streams: list[tuple[Space, Tensor]] = field(default_factory=list)

    def swap(self, R: Tensor, better: Tensor) -> None:
        """Replace R by ``better``."""
        self.turns = [Turn(turn.touch, better) if turn.matrix is R else turn for turn in self.turns]
        self.norms = [(norm, better if old is R else old) for norm, old in self.norms]
        self.streams = [(space, better if old is R else old) for space, old in self.streams]


class Matrices:
    """Makes R for a rotation of some size, one after the other from one seed.

    Args:
        kind: Kind of the matrices.
        block: Number of features that are rotated among themselves; None: all.
        seed: Seed of signs and matrices.
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
        """Signs of a rotation that runs online: always a Hadamard matrix, for speed."""
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
    trace: Marks,
    rotations: Collection[str],
    targets: Callable[[], Mapping[str, nn.Module]],
    matrices: Matrices,
    allow_online: bool,
) -> RotationPlan:
    """Plan the rotations of a model.

    Args:
        model: Model that is rotated; it is not changed here.
        trace: Spaces, heads and products of a run of the model.
        rotations: Names of the rotations: R1, R2, R4, v, u.
        targets: Returns the modules of v and u, by name.
        matrices: Makes the matrices.
        allow_online: Rotations may run at every call of a module.

    Raises:
        ValueError: A rotation is not possible; names what stands in the way.
    """
    plan = RotationPlan()
    everywhere = "v" in rotations or "u" in rotations
    if "R1" in rotations or (everywhere and _possible(streams_of, trace, model)):
        for stream in streams_of(trace, model):
            R = matrices("R1", stream.size, stream.centered)
            plan.turns += [Turn(touch, R) for touch in stream.touches]
            plan.norms += [(norm, R) for norm in stream.norms]
            plan.streams.append((stream, R))
    if "R2" in rotations or (everywhere and _possible(heads_of, trace, model)):
        plan.turns += turns_of_heads(heads_of(trace, model), lambda head: matrices("R2", head.size))
    if "R4" in rotations:
        products = [product for product in trace.products if _has_other_inputs(product)]
        if not products:
            raise ValueError("R4: no weight writes the residual stream from inputs of another space; leave R4 out")
        _add_online(plan, model, "R4", "input", products, matrices)
    sides: dict[str, Side] = {"v": "input", "u": "output"}
    for name in [name for name in sides if name in rotations]:
        chosen = set(targets().values())
        products = [product for product in trace.products if model.get_submodule(product.module) in chosen]
        _add_online(plan, model, name, sides[name], products, matrices)
    if plan.online and not allow_online:
        names = list(plan.online)
        raise ValueError(
            f"{'+'.join(rotations)}: no weight can take in the rotation beside {len(names)} modules, such as "
            f"{', '.join(names[:3])}, and no other loader runs it there (transformers 5.23 would compute something "
            f"else); take rotations=['R1', 'R2'], or set allow_online=True: then only lightning_compress.load loads it"
        )
    return plan


def attach_online(model: nn.Module, online: Mapping[str, list[OnlineRotation]]) -> Callable[[], None]:
    """Attach rotations to modules, by name; the returned function detaches them."""
    modules = {name: model.get_submodule(name) for name in online}
    for name, rotations in online.items():
        before = OnlineRotations.of(modules[name])
        sides = {rotation.side: rotation for rotation in (*(before.rotations if before else ()), *rotations)}
        OnlineRotations(tuple(sides.values())).attach(modules[name])

    def detach() -> None:
        for module in modules.values():
            OnlineRotations.detach(module)

    return detach


def _has_other_inputs(product: Product) -> bool:
    """Whether it writes a residual stream, from inputs that neither lie in a stream nor are values of heads."""
    stream, space = product.output_space.root(), product.input_space
    writes_stream = not stream.fixed and bool(stream.sources)
    return writes_stream and not product.head and (space is None or bool(space.root().fixed))


def _add_online(
    plan: RotationPlan, model: nn.Module, rotation: str, side: Side, products: list[Product], matrices: Matrices
) -> None:
    """Add online rotations to the modules of ``products`` whose side no weight turns already."""
    turned = {(turn.touch.slot, turn.touch.dim) for turn in plan.turns}
    for product in products:
        touches = (product.reads,) if side == "input" else product.writes
        if (touches[0].slot, touches[0].dim) in turned:
            continue
        module = model.get_submodule(product.module)
        if not is_supported(module) or touches[0].slot.module != product.module:
            raise ValueError(
                f"{rotation}: {touches[0].slot.name!r} is not the weight of one module (experts in one tensor), so "
                f"that its {side} cannot be rotated; leave {rotation} out"
            )
        records = plan.online.setdefault(product.module, [])
        if any(record.side == side for record in records):
            continue  # the module is called several times
        size = touches[0].slot.of(model).shape[touches[0].dim]
        record = OnlineRotation(side, matrices.signs(rotation, size))
        records.append(record)
        M = record.matrix()
        plan.turns += [Turn(Touch(touch.slot, touch.dim), M) for touch in touches]


def _possible(find: Callable[[Marks, nn.Module], object], trace: Marks, model: nn.Module) -> bool:
    try:
        find(trace, model)
    except ValueError:
        return False
    return True
