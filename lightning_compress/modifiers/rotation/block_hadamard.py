r"""Block Hadamards: the inputs of Linears and their weights are turned, a few neighbouring features at a time.

MR-GPTQ (Egiazarian et al. 2025, arXiv:2509.23202). With h = 32 and MXFP4, whose scale is a power of two for 32 columns,
an outlier is spread over its group, and over nothing else:

    y = (x B) (W B)^T           B = diag(H, ..., H) / sqrt(h),  H Sylvester's Hadamard matrix of order h, H = H^T

W B is computed once, in float64, and rounded to the weight's dtype; x B at every call (online.py), once for all modules
with one input. Each module is turned for itself, so that any model will do, and outputs stay the same up to rounding.

Shapes: R rows and C columns of W; h divides C.
"""

import math
import warnings
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import PrivateAttr, model_validator
from torch import Tensor, nn

from lightning_compress.core import Event, Modifier, Needs, State
from lightning_compress.layers.expert import ExpertLinear
from lightning_compress.layers.matching import Names, clean_name, select, shortlist, warn_of_left_out, without_towers
from lightning_compress.layers.matrix import (
    CONVOLUTIONS,
    as_matrix,
    check_weights_work,
    is_supported,
    parameter_of,
    write_matrix,
)
from lightning_compress.modifiers.rotation.hadamard import fast_hadamard_transform
from lightning_compress.modifiers.rotation.online import OnlineRotation, OnlineRotations
from lightning_compress.quant.record import Quantized

__all__ = ["BlockHadamardModifier", "turn_blocks"]

BLOCKS = (16, 32, 64, 128)


class BlockHadamardModifier(Modifier):
    """Turn the inputs of Linears by Hadamard matrices, block by block, before they are quantized to 4-bit floats.

    Place it before the quantizer. It works on dense weights, without data, and leaves convolutions and embeddings out.
    The rotation of the inputs runs at every call.

    Args:
        block_size: Number of neighbouring features that are turned together, which must divide the input features of
            every target. 32 is a group of MXFP4, 16 one of NVFP4.
        transform_config: Write the rotation to ``config.json`` of an export as compressed-tensors states it. vLLM
            applies it; transformers ignores it, and would compute something else without an error. By default the
            folder is written such that only ``lightning_compress.load`` loads it.
        start: None: after training, on the final weights. 0: at set-up, before there are optimizers, for modifiers that
            train on a grid (QATModifier).
        targets: Class names, dotted names or ``re:`` patterns of layers.
        ignore: Class names, dotted names or ``re:`` patterns of layers that are left out.

    Raises:
        ValueError: A block does not divide the features of a target, or a target cannot be turned; names the modules.
    """

    needs: ClassVar[Needs] = Needs(one_pass=True, team="weights")

    block_size: Literal[16, 32, 64, 128] = 32
    transform_config: bool = False
    targets: Names = ["Linear"]
    ignore: Names = ["re:.*lm_head"]

    _turned: bool = PrivateAttr(default=False)

    @property
    def unread_by(self) -> tuple[str, ...]:
        return ("transformers",) if self.transform_config else ("transformers", "vLLM")

    @model_validator(mode="after")
    def _begins_at_set_up(self) -> "BlockHadamardModifier":
        if self.start not in (None, 0) or self.end is not None or self.update is not None:
            raise ValueError(
                f"start={self.start}, end={self.end}, update={self.update}: blocks are turned once, at start=0, before "
                f"an optimizer has momenta, or after training; give start=0, or leave all three out"
            )
        return self

    def touches(self, state: State) -> set[str]:
        return set(self._modules(_model(state)))

    def conflict(self, other: Modifier, state: State, earlier: bool) -> str | None:
        if self.start is None and other.needs.parametrizes:
            return "it trains weights on their grids, and turned after training they leave them; give start=0"
        if self.start is not None and earlier and other.needs.parametrizes:
            return "it computes weights from others from set-up on; place it after the rotation"
        return None

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        self._modules(_model(state), warn=True)
        return True

    def on_start(self, state: State, event: Event, **kwargs: Any) -> None:
        if not self._turned:
            self._turn(state, weights=not self.resumed)  # a checkpoint holds turned weights

    def on_training_end(self, state: State, event: Event, **kwargs: Any) -> None:
        if self.start is None:
            self._turn(state)

    def on_module_ready(self, state: State, event: Event, **kwargs: Any) -> None:
        """Nothing is left to do, so that later modifiers may finish module by module."""

    def group_state(self, modules: Mapping[str, nn.Module]) -> dict[str, Any]:
        return {}  # it has acted before the first group

    def _turn(self, state: State, weights: bool = True) -> None:
        modules = self._modules(_model(state))
        rotation = OnlineRotation("input", (1,) * self.block_size)
        distinct = {id(parameter_of(module)): module for module in modules.values()} if weights else {}
        for module in distinct.values():
            W_RC = as_matrix(module)
            with torch.inference_mode(False), torch.no_grad():
                write_matrix(module, turn_blocks(W_RC.double(), self.block_size).to(W_RC.dtype))
        for name, module in modules.items():
            before = OnlineRotations.of(module)
            OnlineRotations((rotation, *(before.rotations if before else ())), self.transform_config).attach(module)
            state.ledger.add(name, "block_hadamard", flag=f"inputs turned online, blocks of {self.block_size}")
        self._turned = True

    def _modules(self, model: nn.Module, warn: bool = False) -> dict[str, nn.Module]:
        """The layers to turn, by name; ValueError names those that cannot be."""
        chosen = without_towers(model, select(model, self.targets, self.ignore), self.targets)
        layers = {name: m for name, m in chosen.items() if is_supported(m) and not isinstance(m, CONVOLUTIONS)}
        if not layers:
            raise ValueError(
                f"targets={self.targets} holds no Linear, only {sorted({type(m).__name__ for m in chosen.values()})}, "
                f"and block Hadamards turn the inputs of Linears alone"
            )
        if warn and (left_out := [name for name in chosen if name not in layers]):
            warnings.warn(
                f"{self.name} turns the inputs of Linears alone and leaves out {shortlist(left_out)}", stacklevel=4
            )
        if warn:
            warn_of_left_out(model, chosen, self.targets, self.ignore)
        check_weights_work(layers, "turn", in_place=True)
        _check_widths(layers, self.block_size)
        _check_free(layers, model)
        return layers


def turn_blocks(W_RC: Tensor, block: int) -> Tensor:
    """W B, in the dtype of W."""
    blocks = W_RC.unflatten(-1, (-1, block))
    return (fast_hadamard_transform(blocks) / math.sqrt(block)).flatten(-2)


def _check_widths(layers: Mapping[str, nn.Module], block: int) -> None:
    """ValueError for layers whose input features no block divides; names the blocks that do."""
    wrong = {name: as_matrix(m).shape[1] for name, m in layers.items() if as_matrix(m).shape[1] % block}
    if not wrong:
        return
    features = next(iter(wrong.values()))
    possible = [b for b in BLOCKS if all(as_matrix(m).shape[1] % b == 0 for m in layers.values())]
    dividing = [b for b in BLOCKS if features % b == 0]
    hint = (
        f"take block_size={possible[-1]}, the largest that divides those of all targets" if possible
        else f"blocks of {dividing} divide {features}, but no block divides those of all targets; "
        f"add the layers that do not fit to ignore" if dividing
        else f"none of {list(BLOCKS)} divides {features}; add these layers to ignore"
    )  # fmt: skip
    raise ValueError(
        f"block_size={block} does not divide the {features} input features of {next(iter(wrong))!r} "
        f"({len(wrong)} layers: {shortlist(wrong)}); {hint}"
    )


def _check_free(layers: Mapping[str, nn.Module], model: nn.Module) -> None:
    """ValueError for experts in one tensor, for quantized or turned layers, and for weights that others use too."""
    for name, module in layers.items():
        before = OnlineRotations.of(module)
        if isinstance(module, ExpertLinear):
            raise ValueError(
                f"{name!r} is a slice of a tensor that holds all experts, and is not turned; add it to ignore"
            )
        if Quantized.of(module) is not None or hasattr(module, "parametrizations"):
            raise ValueError(f"{name!r} is quantized, or parametrized, already; turn blocks before, on dense weights")
        if before is not None and any(rotation.side == "input" for rotation in before.rotations):
            raise ValueError(f"the inputs of {name!r} are turned already; add it to ignore")
    users = defaultdict(list)
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            users[id(parameter)].append(clean_name(name))
    for name, module in layers.items():
        if others := [user for user in users[id(parameter_of(module))] if user not in layers]:
            raise ValueError(
                f"{name!r} shares its weight with {others[0]!r}, which would be turned as well; add {name!r} to ignore"
            )


def _model(state: State) -> nn.Module:
    assert state.model is not None
    return state.model
