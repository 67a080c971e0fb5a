"""The order of the walk: segments of blocks that pass a hidden state on, and the modules between them.

Within a segment the input of each block is the output of the block before, so inputs are computed once per segment.
Where that chain breaks (an encoder's end, stages that change shape, arguments computed from a block's output) a new
segment begins: its inputs come from a run of the model from its start, through blocks that are compressed already. That
is correct and slower. Each segment's run with stubs is compared with the dense run on the first batch.
"""

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_compress.calibration.activations import BlockCall, put, take, taken_off
from lightning_compress.calibration.blocks import modules_outside
from lightning_compress.calibration.capture import BrokenLinkError, capture, stubbed
from lightning_compress.calibration.probe import Probe, ProbedBlock

__all__ = ["CalibrationPlan", "make_plan"]

logger = logging.getLogger(__name__)


@dataclass
class CalibrationPlan:
    """The order of work.

    Args:
        blocks: Blocks that are walked, by name; empty: the model is walked as a whole.
        segments: Blocks in the order of their calls; the inputs of each segment take a run from the model's start.
        uncalled: Blocks that the forward pass does not reach.
        outside: Modules outside of all blocks: ``outside[s]`` run before segment ``s``, the last ones after all.
        stub_last: Whether modules after the last segment can be reached with that segment stubbed.
    """

    blocks: dict[str, nn.Module] = field(default_factory=dict)
    segments: list[list[ProbedBlock]] = field(default_factory=list)
    uncalled: dict[str, nn.Module] = field(default_factory=dict)
    outside: list[dict[str, nn.Module]] = field(default_factory=list)
    stub_last: bool = False

    def split(self, index: int) -> None:
        """Turn a segment into one segment for each of its blocks."""
        if index + 1 == len(self.segments):
            self.stub_last = False
        single = [[block] for block in self.segments[index]]
        self.segments[index : index + 1] = single
        self.outside[index : index + 1] = [{} for _ in single]


def make_plan(
    model: nn.Module,
    run: Callable[[], Any],
    blocks: Mapping[str, nn.Module],
    probe: Probe,
    targets: Mapping[nn.Module, str],
) -> CalibrationPlan:
    """Order the work; the model is dense, hooks of the modifiers are paused, and ``run`` runs the batch of the probe.

    ``targets`` are the modules that modifiers have hooked, with their names.
    """
    calls = [block.name for block in probe.blocks]
    if repeated := sorted({name for name in calls if calls.count(name) > 1}):
        warnings.warn(
            f"block {repeated[0]!r} runs {calls.count(repeated[0])} times per forward pass (shared weights?), so its "
            f"inputs cannot be stored block by block: the model is walked as a whole, which needs the statistics of "
            f"all targets at once; name other blocks with blocks=[...]",
            stacklevel=2,
        )
        return plan_without_blocks(model)
    if blocks and not calls:
        warnings.warn(
            f"the forward pass reaches none of the {len(blocks)} blocks ({next(iter(blocks))!r}, ...): the model is "
            f"walked as a whole; name other blocks with blocks=[...]",
            stacklevel=2,
        )
    if not calls:
        return plan_without_blocks(model)
    uncalled = {name: block for name, block in blocks.items() if name not in calls}
    if uncalled:
        warnings.warn(f"the forward pass does not reach the blocks {list(uncalled)}: they see no data", stacklevel=2)
    segments = [s for linked in _linked_runs(probe.blocks) for s in _verified(run, linked, blocks)]
    if len(segments) > 1:
        firsts = ", ".join(repr(segment[0].name) for segment in segments[1:])
        logger.info("inputs of %s are computed by running the model from its start (correct, but slower)", firsts)
    return CalibrationPlan(
        blocks=dict(blocks),
        segments=segments,
        uncalled=uncalled,
        outside=_between(model, blocks, segments, probe),
        stub_last=_tail_is_reached(run, segments[-1], blocks, probe, targets),
    )


def plan_without_blocks(model: nn.Module) -> CalibrationPlan:
    """A plan without blocks: all modules at once."""
    return CalibrationPlan(outside=[modules_outside(model, {})])


def _linked_runs(blocks: Sequence[ProbedBlock]) -> list[list[ProbedBlock]]:
    """Cut where the chain breaks, and where the shape changes unless the blocks take nothing but the hidden state."""
    runs: list[list[ProbedBlock]] = []
    for block in blocks:
        if runs and block.linked:
            runs[-1].append(block)
        else:
            runs.append([block])
    cut: list[list[ProbedBlock]] = []
    for linked in runs:
        bare = all(block.call.is_bare for block in linked[1:])
        for i, block in enumerate(linked):
            if i > 0 and (bare or linked[i - 1].keeps_shape):
                cut[-1].append(block)
            else:
                cut.append([block])
    return cut


def _verified(
    run: Callable[[], Any], segment: list[ProbedBlock], modules: Mapping[str, nn.Module]
) -> list[list[ProbedBlock]]:
    """The segment, or each of its blocks as one when a run with stubs does not show their arguments."""
    if len(segment) == 1 or all(block.call.is_bare for block in segment[1:]):
        return [segment]
    try:
        _, calls = capture(run, segment, modules)
        wrong = next((b.name for b in segment if not _same_arguments(calls[b.name], b.call)), None)
        reason = f"arguments of {wrong!r} are computed from outputs of blocks" if wrong is not None else None
    except BrokenLinkError as error:
        reason = str(error)
    except Exception as error:  # the model's own code, fed by stubs
        reason = f"stubbed, the model raises {type(error).__name__}: {error}"
    if reason is None:
        return [segment]
    logger.info("blocks %s to %s are run one by one: %s", segment[0].name, segment[-1].name, reason)
    return [[block] for block in segment]


def _between(
    model: nn.Module, blocks: Mapping[str, nn.Module], segments: Sequence[Sequence[ProbedBlock]], probe: Probe
) -> list[dict[str, nn.Module]]:
    """Modules outside of all blocks, by the segment before which their last call comes; uncalled ones at the end."""
    starts, calls = [], 0
    for segment in segments:
        starts.append(calls)
        calls += len(segment)
    groups: list[dict[str, nn.Module]] = [{} for _ in range(len(segments) + 1)]
    for name, module in modules_outside(model, blocks).items():
        before = probe.gap.get(module, calls)
        groups[sum(start < before for start in starts)][name] = module
    return groups


def _tail_is_reached(
    run: Callable[[], Any],
    segment: Sequence[ProbedBlock],
    blocks: Mapping[str, nn.Module],
    probe: Probe,
    targets: Mapping[nn.Module, str],
) -> bool:
    """True when, with the last segment stubbed, the targets outside of all blocks get the inputs they got before."""
    wanted = {module: probe.inputs[module] for module in probe.inputs if module in targets}
    if not wanted:
        return True
    last = segment[-1]
    hidden = take(probe.last_output, last.out_at)
    if not isinstance(hidden, Tensor):
        return False
    seen: dict[nn.Module, Any] = {}

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen[module] = (args, kwargs)

    hooks = taken_off(m.register_forward_pre_hook(note, with_kwargs=True, prepend=True) for m in wanted)
    try:
        with hooks, stubbed(segment, blocks, last=lambda: put(last.template, last.out_at, hidden)):
            run()
    except Exception as error:  # the model's own code, fed by stubs
        logger.info("stubbed, the model raises %s: %s", type(error).__name__, error)
        return False
    if all(m in seen and _same_arguments(BlockCall(*seen[m]), BlockCall(*wanted[m])) for m in wanted):
        return True
    logger.info("modules after the blocks use more than the last block's output: the whole model is run for them")
    return False


def _same_arguments(one: BlockCall, other: BlockCall) -> bool:
    """Equal tensors, equal plain values; other objects are not compared."""
    left, right = tree_leaves((one.args, one.kwargs)), tree_leaves((other.args, other.kwargs))
    return len(left) == len(right) and all(_same(a, b) for a, b in zip(left, right, strict=True))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))
    if isinstance(a, (bool, int, float, str, type(None), Tensor)) or isinstance(b, Tensor):
        return bool(type(a) is type(b) and a == b)
    return type(a) is type(b)
