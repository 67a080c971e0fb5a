"""The state of one calibration: its batches, its plan, how far it is (events in the order of sequential.py)."""

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.calibration.activations import (
    BatchRunner,
    SegmentInputs,
    device_of,
    first_bad_module,
    numbers_in,
    put,
    rows_in,
    small_sample,
    take,
    tensors_of,
    token_mask,
    tree_move,
)
from lightning_compress.calibration.block_passes import BlockPasses, ModuleGroup, one_pass_obstacle
from lightning_compress.calibration.blocks import modules_of_block, modules_outside
from lightning_compress.calibration.capture import BrokenLinkError, capture, run_to_stop, stopped_before, stubbed
from lightning_compress.calibration.divergence import BlockOutputs, children_of, compared_batches
from lightning_compress.calibration.group_log import GroupLog
from lightning_compress.calibration.lockstep import MOST_BATCHES
from lightning_compress.calibration.options import CalibrationOptions
from lightning_compress.calibration.plan import CalibrationPlan, make_plan, plan_without_blocks
from lightning_compress.calibration.probe import NonFiniteError, Probe, ProbedBlock, nonfinite_error, run_probe
from lightning_compress.calibration.residence import InMemory, OnDisk, Residence, exact_device
from lightning_compress.calibration.walk_memory import lockstep_bytes, megabytes, memory_limit, workspace_bytes
from lightning_compress.core import Event, Lifecycle, State
from lightning_compress.layers.memory import release

__all__ = ["Walker"]

logger = logging.getLogger(__name__)


class Walker:
    """Walks a model; the arguments are those of :func:`lightning_compress.calibration.calibrate`."""

    def __init__(
        self,
        lifecycle: Lifecycle,
        state: State,
        clock: Event,
        batches: Sequence[Any] | None,
        runner: BatchRunner,
        options: CalibrationOptions,
        progress: Callable[[str, int, int], None] | None,
        log: GroupLog,
        residence: Residence | None = None,
    ):
        self.lifecycle, self.state, self.clock, self.runner = lifecycle, state, clock, runner
        self.probe_batch = batches[0] if batches else None
        self.numbers = state.team.mine(len(batches or ()))  # of the batches that are this rank's
        self.batches = [batches[i] for i in self.numbers] if batches else []
        self.count = len(batches or ())  # of the batches of all ranks
        self.options, self.walk, self.progress, self.log = options, options.walk, progress, log
        self.device, self.offload_device = exact_device(options.device), exact_device(options.offload_device)
        self.residence: Residence = InMemory(self.device) if residence is None else residence
        self.model = runner.model
        self.plan = CalibrationPlan()
        self.finished, self.total = 0, 1
        self.outputs = BlockOutputs({}, {}, 0, state.team, 0)
        self.passes = BlockPasses(lifecycle, state, clock, [], Probe(), False, self.report, log)

    def walk_without_data(self, blocks: Mapping[str, nn.Module]) -> None:
        """BLOCK_END for every block and for the modules outside of blocks; no forward pass."""
        for name, block in blocks.items():
            self.report(name)
            with self.residence.visit(name, block):
                self.passes.end(block_group(name, block))
            self.finish_group()
        self.residence.outside(self.model, blocks)
        self.report("modules outside of blocks")
        self.passes.end(outside_group(modules_outside(self.model, blocks)))
        self.finish_group()
        self.report("done")

    def walk_with_data(self, blocks: Mapping[str, nn.Module]) -> None:
        """Probe, plan, then segment after segment."""
        if not blocks and self.walk != "whole":
            logger.info(
                "no repeated blocks in %s: it is walked as a whole, which stores the activations or statistics of all "
                "modules at once; name its blocks with blocks=[...] if it has any",
                type(self.model).__name__,
            )
        with ExitStack() as stack:
            if not blocks:
                stack.enter_context(self.residence.visit("", self.model))
            self.residence.outside(self.model, blocks)
            self._prepare(blocks)
            stack.enter_context(self.passes.threads)
            plan, index, inputs = self.plan, 0, SegmentInputs(self.offload_device)
            while index < len(plan.segments):
                segment = plan.segments[index]
                with stopped_before(plan.blocks[segment[0].name]):
                    self._complete_outside(index, lambda i: run_to_stop(partial(self._run, i)))
                if getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
                    decoding = "decoder" in segment[0].name.split(".")
                    self.passes.masks = self._masks("decoder_attention_mask" if decoding else "attention_mask")
                captured = self._capture(segment)
                if self.state.team.agree(captured is None, segment[0].name) or captured is None:
                    plan.split(index)
                    continue
                inputs = captured
                is_last = index + 1 == len(plan.segments)
                self._walk_segment(segment, inputs, keep_last=is_last and self._tail_needs_output())
                index += 1
            for name, block in plan.uncalled.items():
                with self.residence.visit(name, block):
                    self.passes.end(block_group(name, block))
                self.finish_group()
            if plan.segments and plan.stub_last:
                stack.enter_context(stubbed(plan.segments[-1], plan.blocks, last=lambda: self._last_output(inputs)))
            self._complete_outside(index, self._run)
        self.finished = self.total
        self.report("done")

    # -- before the walk ----------------------------------------------------------------------------------------------

    def _prepare(self, blocks: Mapping[str, nn.Module]) -> None:
        names = {m: n for n, m in modules_of_block("", self.model).items()}
        calibrating = [m for m in self.lifecycle.modifiers if m.needs.calibration]
        targets = {m: names[m] for modifier in calibrating for m in modifier.hooked if m in names}
        self.report("probe: the first batch through the dense model")
        masks = self._masks("attention_mask")
        with self.lifecycle.paused(), self.residence.passing(blocks):
            probe, run = self._probe(blocks, targets)
            for module in warn_of_targets(self.model, probe, targets):
                del targets[module]  # no batch can reach them
            plan = make_plan(self.model, run, blocks, probe, targets) if blocks else plan_without_blocks(self.model)
            self._keep_outputs(plan)
        probe.inputs, probe.last_output = {}, None  # activations that only the plan needed
        self.residence.check(plan, [name for module, name in targets.items() if module not in probe.counts])
        self.plan = plan
        explicit = self.walk == "one_pass"
        obstacle = one_pass_obstacle(self.lifecycle.modifiers, probe.counts, targets, uncalled=explicit)
        if explicit and obstacle is not None:
            raise ValueError(f"walk='one_pass' is not possible: {obstacle}; use walk='two_pass' or walk='auto'")
        reason = obstacle
        if obstacle is None and self.walk == "auto" and self.plan.blocks:
            device = self.device or device_of(self.model)
            sizes = self.state.team.gather(sum(map(numbers_in, self.batches)), "the memory of one pass")
            stored = 1 + any(modifier.needs.dense_inputs for modifier in self.lifecycle.modifiers)
            size = lockstep_bytes(probe, stored * sum(sizes)) + workspace_bytes(device, self.count)
            limit = memory_limit(self.options.memory_limit, self.model, self.device)
            reason = f"one pass takes about {megabytes(size)}, and memory_limit allows {megabytes(limit)}"
            obstacle = reason if self.state.team.agree(size > limit) else None
            if obstacle is None and self.count > MOST_BATCHES:
                obstacle = reason = (
                    f"one pass has a thread for each batch, {self.count}, and {MOST_BATCHES} are allowed"
                )
        one_pass = obstacle is None and self.walk in ("auto", "one_pass")
        passes = "one pass" if one_pass else "two passes"
        logger.info("%s over %d blocks%s", passes, len(self.plan.blocks), f": {reason}" if reason else "")
        self.passes = BlockPasses(
            self.lifecycle, self.state, self.clock, masks, probe, one_pass, self.report, self.log, self.numbers
        )
        self.total = len(self.plan.blocks) + 1

    def _keep_outputs(self, plan: CalibrationPlan) -> None:
        """Keep outputs of the dense model, to compare with.

        Not where blocks are on disk, which would be read once more, or where modifiers train them or cut them later.
        """
        needs = [modifier.needs for modifier in self.lifecycle.modifiers]
        if isinstance(self.residence, OnDisk) or any(one.hand_over or one.changes_shapes for one in needs):
            return
        places = {block.name: block.out_at for segment in plan.segments for block in segment}
        modules = {name: plan.blocks[name] for name in places} or children_of(self.model)
        count = compared_batches(self.count, rows_in(self.probe_batch))
        self.outputs = BlockOutputs(modules, places, count, self.state.team, self.count)
        self.outputs.keep(self._run)

    def compare_outputs(self, blocks: Mapping[str, nn.Module]) -> None:
        """After the walk: the rest of the comparison with the dense model, and its result into the ledger."""
        trained = any(modifier.needs.after_walk for modifier in self.lifecycle.modifiers)
        if self.outputs.numbers and (trained or not self.plan.segments):
            passing = self.residence.passing(blocks) if blocks else self.residence.visit("", self.model)
            with self.lifecycle.paused(), passing:
                self.outputs.compare_all(self._run, self.passes.masks)
        self.state.ledger.blocks |= self.outputs.result()

    def _masks(self, key: str) -> list[Tensor | None]:
        return [self._mask(batch, key) for batch in self.batches]

    def _mask(self, batch: Any, key: str = "attention_mask") -> Tensor | None:
        mask: Tensor | None = tree_move(token_mask(batch, key), self.device or device_of(self.model))
        return mask

    def _probe(
        self, blocks: Mapping[str, nn.Module], targets: Mapping[nn.Module, str]
    ) -> tuple[Probe, Callable[[], Any]]:
        """Probe with a small sample if that reaches every target, otherwise with the first batch, on every rank."""
        batch, never = self.probe_batch, unreachable(self.model)
        if (sample := small_sample(batch)) is not None:
            run = partial(self.runner, sample)
            try:
                probe = run_probe(self.model, run, blocks, targets, token_mask(sample))
                probe.numbers = numbers_in(sample)
                if all(module in probe.counts or module in never for module in targets):
                    return probe, run
            except Exception as error:  # the model may need full batches; a fault shows up again with them
                logger.info("a small sample alone cannot be run: %s: %s", type(error).__name__, error)
        run = partial(self.runner, batch)
        probe = run_probe(self.model, run, blocks, targets, self._mask(batch))
        probe.numbers = numbers_in(batch)
        return probe, run

    # -- the walk -----------------------------------------------------------------------------------------------------

    def _capture(self, segment: Sequence[ProbedBlock]) -> SegmentInputs | None:
        """Inputs of a segment; None when a batch does not run through the blocks as the first one did."""
        inputs = SegmentInputs.kept(self.offload_device, self.options.cache_folder)
        names = {block.name for block in segment}
        before = {name: block for name, block in self.plan.blocks.items() if name not in names}
        with self.lifecycle.paused(), self.residence.passing(before):
            for i in range(len(self.batches)):
                self.passes.begin(i, f"{segment[0].name}: inputs, batch {i + 1}/{len(self.batches)}")
                try:
                    hidden, calls = capture(partial(self._run, i), segment, self.plan.blocks)
                except Exception as error:
                    if len(segment) == 1 and isinstance(error, BrokenLinkError):
                        raise ValueError(
                            f"calibration batch {self.numbers[i]} does not run through the model as the first one did: "
                            f"{error}; use walk='whole'"
                        ) from error
                    if len(segment) == 1:  # no stub can be the cause
                        raise
                    ends = segment[0].name, segment[-1].name
                    logger.info("blocks %s to %s are run one by one: batch %d: %s", *ends, i, error)
                    return None
                self.passes.checks.add(hidden, self.passes.masks[i], partial(self._input_error, segment[0].name, i))
                inputs.add(hidden, calls)
            self.passes.checks.read()
        return inputs

    def _input_error(self, block: str, i: int, kind: str) -> ValueError:
        source = first_bad_module(self.model, "", partial(self._run, i))
        return nonfinite_error(kind, f"the input of block {block!r}", self.numbers[i], source)

    def _walk_segment(self, segment: Sequence[ProbedBlock], inputs: SegmentInputs, keep_last: bool) -> None:
        """Block after block. The hidden states in ``inputs`` advance with them, and so do those of the dense model."""
        needs = [modifier.needs for modifier in self.lifecycle.modifiers]
        compared = any(one.dense_outputs or one.dense_inputs for one in needs)
        dense = inputs.dense_copy() if compared else None
        for block in segment:
            module = self.plan.blocks[block.name]
            with self.residence.visit(block.name, module):
                dense_outputs = None if dense is None else self._pass_dense(block, module, dense)
                run = partial(self._run_block, block, module, inputs)
                needed = keep_last or block is not segment[-1]
                propagate = partial(self._propagate, block, run, inputs) if needed else None
                try:
                    self.passes.complete(block_group(block.name, module), run, propagate, dense_outputs)
                    self._compare(block, run, inputs if needed else None)
                except NonFiniteError as error:
                    with self.lifecycle.paused():
                        again = partial(self._call_block, block, module, inputs, error.batch)
                        source = first_bad_module(module, block.name, again)
                    raise nonfinite_error(error.kind, error.where, self.numbers[error.batch], source) from None
            inputs.drop(block.name)
            self.finish_group()

    def _compare(self, block: ProbedBlock, run: Callable[[int], Any], outputs: SegmentInputs | None) -> None:
        """Compare the outputs of a finished block with the dense ones; ``outputs``: where they are stored already."""
        if any(modifier.needs.after_walk for modifier in self.lifecycle.modifiers):
            return  # they change once more
        for i in range(len(self.outputs.numbers)):
            if outputs is None:
                with self.lifecycle.paused(), torch.random.fork_rng(devices=[]):
                    self.passes.begin(i, f"{block.name}: comparison, batch {i + 1}")
                    hidden = take(run(i), block.out_at)
            else:
                hidden = outputs.read(i)
            if isinstance(hidden, Tensor):
                self.outputs.compare(block.name, i, hidden, self.passes.masks[i])

    def _pass_dense(
        self, block: ProbedBlock, module: nn.Module, dense: SegmentInputs
    ) -> Callable[[int], Tensor] | None:
        """Advance the hidden states of the dense model by a block; a function that gives them by batch.

        None where there are no hidden states, or where the block returns another tensor of floats before them: a
        replay would be compared with that one.
        """
        if not dense.hidden or dense.hidden[0] is None:
            return None
        run, leads = partial(self._run_block, block, module, dense), True
        with self.lifecycle.dense_pass():
            for i in range(len(self.batches)):
                self.passes.begin(i, f"{block.name}: dense, batch {i + 1}/{len(self.batches)}")
                output = run(i)
                hidden = take(output, block.out_at)
                leads &= next(t for t in tensors_of(output) if t.is_floating_point()) is hidden
                dense.replace(i, hidden)
        if not leads:
            return None

        def dense_output(i: int) -> Tensor:
            hidden = dense.read(i)
            assert hidden is not None
            return hidden

        return dense_output

    def _call_block(self, block: ProbedBlock, module: nn.Module, inputs: SegmentInputs, i: int) -> Any:
        args, kwargs = inputs.arguments(i, block.name, device_of(module), copy=block.writes)
        return module(*args, **kwargs)

    def _run_block(self, block: ProbedBlock, module: nn.Module, inputs: SegmentInputs, i: int) -> Any:
        output = self._call_block(block, module, inputs, i)
        where = f"the output of block {block.name!r}"
        hidden, mask = take(output, block.out_at), self.passes.masks[i]
        self.passes.checks.add(hidden, mask, lambda kind: NonFiniteError(kind, where, i))
        return output

    def _propagate(self, block: ProbedBlock, run: Callable[[int], Any], inputs: SegmentInputs, i: int) -> None:
        inputs.replace(i, take(run(i), block.out_at))

    # -- outside of blocks --------------------------------------------------------------------------------------------

    def _complete_outside(self, index: int, run: Callable[[int], Any]) -> None:
        """Finish the modules that run before segment ``index``, or after all of them."""
        modules = self.plan.outside[index]
        if modules or not self.plan.segments:
            with self.residence.passing(self.plan.blocks):
                self.passes.complete(outside_group(modules), run, None)

    def _tail_needs_output(self) -> bool:
        hooked = {m for modifier in self.lifecycle.modifiers if modifier.needs.calibration for m in modifier.hooked}
        return self.plan.stub_last and not hooked.isdisjoint(self.plan.outside[-1].values())

    def _run(self, i: int) -> Any:
        return self.runner(self.batches[i])

    def _last_output(self, inputs: SegmentInputs) -> Any:
        """What the last block gave for the batch that runs now."""
        last = self.plan.segments[-1][-1]
        home = device_of(self.plan.blocks[last.name])
        home = device_of(self.model) if home is not None and home.type == "meta" else home  # its block is on disk
        hidden = inputs.read(self.passes.batch, home)
        assert isinstance(hidden, Tensor)
        moved = hidden.to(home) if home is not None else hidden
        # a copy, since the model may write into it
        return put(last.template, last.out_at, hidden.clone() if moved is hidden else moved)

    def finish_group(self) -> None:
        """A block, or the modules outside of blocks, are finished."""
        self.finished += 1
        release()
        self.log.interrupt()

    def report(self, text: str) -> None:
        if self.progress is not None:
            self.progress(text, self.finished, self.total)


def block_group(name: str, block: nn.Module) -> ModuleGroup:
    """The modules of one block."""
    return ModuleGroup(name, block, modules_of_block(name, block), name)


def outside_group(modules: Mapping[str, nn.Module]) -> ModuleGroup:
    """Modules outside of all blocks."""
    return ModuleGroup("", None, modules, "modules outside of blocks")


def warn_of_targets(model: nn.Module, probe: Probe, targets: Mapping[nn.Module, str]) -> list[nn.Module]:
    """Warn of the targets that the first batch does not reach; those that no batch can reach are returned."""
    unseen = {module: name for module, name in targets.items() if module not in probe.counts}
    never = unreachable(model) & unseen.keys()
    if bypassed := [name for module, name in unseen.items() if module in never]:
        warnings.warn(
            f"{bypassed}: nn.MultiheadAttention uses the weight of its out_proj without calling it, so no data is seen "
            f"there; make MultiheadAttention a target too, which calls it in calibration, or add them to ignore",
            stacklevel=2,
        )
    if other := [name for name in unseen.values() if name not in bypassed]:
        warnings.warn(
            f"the first batch does not reach the targets {other}: without data from other batches they stay without "
            f"calibration; check that forward runs them, or add them to ignore",
            stacklevel=2,
        )
    return list(never)


def unreachable(model: nn.Module) -> set[nn.Module]:
    """Modules whose weight another module uses without calling them."""
    return {m.out_proj for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
