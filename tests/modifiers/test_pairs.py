"""Every two modifiers that act while training, in both orders, at three times: they work, or set-up names both."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import nn

from lightning_compress import (
    ConstantPruningModifier,
    DistillationModifier,
    FreezeModifier,
    LearnedMaskModifier,
    MagnitudePruningModifier,
    Modifier,
    MovementPruningModifier,
    QATModifier,
    StructuredPruningModifier,
)
from lightning_compress.core import Lifecycle, State
from tests.support.training_loop import network, train

WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
STATIC = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}


def quantized(inputs: dict | None) -> dict:
    return {"w8": {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": inputs}}


MAKERS: dict[str, Callable[[float], Modifier]] = {
    "qat": lambda start: QATModifier(config_groups=quantized(None), start=start),
    "qat static": lambda start: QATModifier(config_groups=quantized(STATIC), start=start),
    "magnitude": lambda start: MagnitudePruningModifier(final_sparsity=0.5, start=start, end=start + 3),
    "2:4": lambda start: MagnitudePruningModifier(mask_structure="2:4", start=start),
    "constant": lambda start: ConstantPruningModifier(start=start),
    "movement": lambda start: MovementPruningModifier(final_sparsity=0.5, start=start, end=start + 3),
    "learned mask": lambda start: LearnedMaskModifier(start=start, end=start + 3),
    "structured": lambda start: StructuredPruningModifier(
        dimension="channels", ratio=0.25, start=start, end=start + 3 if start else None, input_shape=[16]
    ),
    "distill": lambda start: DistillationModifier(start=start),
    "freeze": lambda start: FreezeModifier(targets=["re:0.*"], start=start, end=start + 3),
}
MASKS = {"magnitude", "2:4", "movement", "learned mask"}
SHAPED = MASKS | {"qat", "qat static", "constant"}


def refused(first: str, second: str, starts: tuple[int, int]) -> bool:
    """What cannot be: two masks or two grids on one weight; shapes that change under a mask or a grid; a mask that is
    learned under a grid; a teacher that is copied from a model which is no plain one any more."""
    pair, start = {first, second}, dict(zip((first, second), starts, strict=True))
    if pair <= MASKS or pair == {"qat", "qat static"}:
        return True
    if "structured" in pair and pair & SHAPED:
        (other,) = pair - {"structured"}
        at_set_up = other in ("qat", "qat static", "learned mask")
        kept = -1 if at_set_up or start[other] == 0 else start[other]
        cut = -1 if start["structured"] == 0 else start["structured"] + 3
        return cut > kept or (cut == kept and second == "structured")
    if "learned mask" in pair and pair & {"qat", "qat static"}:
        (grid,) = pair - {"learned mask"}
        return start[grid] < start["learned mask"] + 3
    if "distill" in pair and pair & {"qat", "qat static", "learned mask"}:
        return second == "distill"
    if pair == {"structured", "distill"}:
        return start["structured"] == 0 and (second == "distill" or start["distill"] > 0)
    return False


@pytest.mark.parametrize("starts", [(0, 0), (0, 2), (2, 0)], ids=str)
@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(MAKERS, 2)))
def test_two_modifiers_work_together_or_are_refused_at_set_up_by_both_names(first, second, starts):
    pytest.importorskip("torch_pruning")
    model = network()
    modifiers = [MAKERS[name](start) for name, start in zip((first, second), starts, strict=True)]
    lifecycle, state = Lifecycle(modifiers), State(model=model)
    if refused(first, second, starts):
        one, other = lifecycle.keys()
        with pytest.raises(ValueError, match=rf"(?s)({one}\b.*{other}\b|{other}\b.*{one}\b)"):
            lifecycle.initialize(state)
        return
    lifecycle.initialize(state)
    train(model, [], 7, lifecycle=lifecycle)
    lifecycle.finalize(state)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if {first, second} & (MASKS - {"learned mask"}):
        assert all(float((m.weight == 0).float().mean()) >= 0.45 for m in linears)
    if {first, second} & {"qat", "qat static"}:
        assert all(len(row.unique()) <= 256 for m in linears for row in m.weight)
    if "structured" in (first, second):
        assert linears[0].weight.shape == (24, 16)
