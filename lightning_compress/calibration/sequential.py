"""The walk: calibration data through a model, block by block; each is compressed before its outputs reach the next.

    CALIBRATION_START                      hooks go on
    survey                                 for modifiers that need it: all batches through the dense model, and back
    probe                                  the first batch once through the dense model: the order of things
    for each segment of linked blocks:
        modules before it                  BLOCK_END, with no block
        capture                            its first block's inputs, and every block's own arguments; blocks are not run
        for each block:
            statistics                     all batches through the block, hooks on            | one pass: in lockstep,
            BLOCK_END                      modifiers compress it                              | MODULE_READY per module,
            outputs                        all batches through the compressed block, paused   | then BLOCK_END
    modules after the blocks               BLOCK_END, with no block
    CALIBRATION_END                        hooks come off; modifiers that need gradients train

Nothing is traced. The hidden states of one block are stored; other arguments are stored by reference until their block
is finished. Where several processes walk (``state.team``), each runs batches of its own, whole ones, and all finish the
same modules in the same order.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_compress.calibration.activations import BatchRunner, check_weights, device_of, token_mask, tree_move
from lightning_compress.calibration.blocks import find_blocks, modules_of_block, modules_outside
from lightning_compress.calibration.gradient_survey import Gradients, gradients_of
from lightning_compress.calibration.group_log import GroupLog, NoLog
from lightning_compress.calibration.inputs import check_batch
from lightning_compress.calibration.modes import calibration_mode
from lightning_compress.calibration.options import CalibrationOptions
from lightning_compress.calibration.residence import InMemory, Residence
from lightning_compress.calibration.walker import Walker
from lightning_compress.calibration.whole_model import run_whole
from lightning_compress.core import Event, EventType, Lifecycle, Modifier, State
from lightning_compress.layers.memory import small_heap
from lightning_compress.layers.split_experts import split_while, watched
from lightning_compress.layers.towers import find_towers, tower_of
from lightning_compress.team import Team

__all__ = ["calibrate", "end_training"]

PIECE = 2**22  # bytes; larger ones are mapped: of 2, 4, 8 and 32 MiB the least memory, in CPU time within 4 % of 32 MiB
KEPT = 2**25  # bytes of a heap; 4 MiB lead to 1.2 times as many page faults in one pass, and 1.9 times in two passes


def end_training(lifecycle: Lifecycle, state: State, clock: Event = Event()) -> None:  # noqa: B008  (frozen)
    """Emit TRAINING_END: the turn between training and calibration.

    Where a modifier has a handler for it, the model is as in calibration meanwhile: in eval mode, without gradients,
    with a Linear for each expert of a fused mixture. There NaN or Inf in the weights is a ValueError.
    """
    event = replace(clock, type_=EventType.TRAINING_END)
    if not any(modifier.handles_training_end for modifier in lifecycle.modifiers):
        lifecycle.emit(state, event)
        return
    with split_while(state.model), calibration_mode(state.model):
        check_weights(state.model)
        lifecycle.emit(state, event)


def calibrate(
    lifecycle: Lifecycle,
    state: State,
    batches: Sequence[Any] | None,
    options: CalibrationOptions = CalibrationOptions(),  # noqa: B008  (frozen)
    *,
    clock: Event = Event(),  # noqa: B008  (frozen)
    forward: Callable[[nn.Module, Any], Any] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    residence: Residence | None = None,
    log: GroupLog = NoLog(),  # noqa: B008  (without state)
) -> None:
    """Show calibration data to the modifiers and let them compress the model, block after block.

    Args:
        lifecycle: The initialized modifiers.
        state: State with the model, which is changed in place.
        batches: Calibration batches, in order; None for recipes that need no data. With several processes each needs
            the first one and its own (``state.team.mine(len(batches))``); in the place of others anything may be.
        options: How calibration goes through the model. The seed is not used here.
        clock: Clock of the events.
        forward: ``forward(model, batch)`` runs the model on a batch; by default a mapping gives keyword arguments, of a
            tuple or list the first item is the input, and anything else is the input.
        progress: Called with a text, the number of finished blocks and the number of all blocks.
        residence: Where the blocks live; None: in memory.
        log: Log of finished groups, of which it may hold some already; it may also interrupt the calibration.

    Raises:
        ValueError: No batches although a modifier needs them, NaN or Inf in weights or activations, ``blocks`` that
            match nothing, a walk that a modifier or the model does not allow.
    """
    model = state.model
    if model is None:
        raise ValueError("state.model is None; expected the model to compress, as State(model=model)")
    _check_batches(lifecycle.modifiers, batches)
    blocks = {} if options.walk == "whole" else find_blocks(model, options.blocks)
    if batches is not None:
        batches = list(batches)
    if batches and forward is None and any(m.needs.data for m in lifecycle.modifiers):
        check_batch(model, batches[0])
    runner = BatchRunner(model, forward)
    walker = Walker(lifecycle, state, clock, batches, runner, options, progress, log, residence)
    # training continues on weights in one tensor: the modifier that comes next does not know the experts in it
    mixtures = nullcontext() if any(m.needs.hand_over for m in lifecycle.modifiers) else split_while(model)
    heap = small_heap(PIECE, KEPT) if residence is None else nullcontext()  # the caller's
    try:
        with (
            _warnings_once(state.team),
            mixtures,
            watched(model, options.moe_calibrate_all_experts),
            calibration_mode(model),
            heap,
        ):
            log.begin(lifecycle, state, batches or [], blocks, options)
            _emit_all(walker, blocks)
        state.team.gather(None, "calibration")  # an error that came last reaches all
    except BaseException as error:
        lifecycle.set_token_mask(None)
        lifecycle.abort()
        state.team.fail(error)
        if isinstance(error, torch.OutOfMemoryError):
            error.add_note("while calibrating: try smaller batches, walk='two_pass', offload_device='cpu'")
        raise


@contextmanager
def _warnings_once(team: Team) -> Iterator[None]:
    """Inside, rank 0 alone warns: all ranks come to the same warnings."""
    with warnings.catch_warnings() if team.rank else nullcontext():
        if team.rank:
            warnings.simplefilter("ignore")
        yield


def _emit_all(walker: Walker, blocks: Mapping[str, nn.Module]) -> None:
    """From CALIBRATION_START to CALIBRATION_END."""
    lifecycle, state, clock, has_data = walker.lifecycle, walker.state, walker.clock, walker.probe_batch is not None
    walker.total = len(blocks) + 1
    check_weights(walker.model)
    lifecycle.emit(state, replace(clock, type_=EventType.CALIBRATION_START))
    if has_data and any(m.needs.survey for m in lifecycle.modifiers):
        _survey(walker, blocks)
    if has_data and any(m.hooked for m in lifecycle.modifiers if m.needs.calibration):
        blocks = _without_idle_towers(walker, blocks)
        with _unreached_towers(walker.model):
            walker.walk_with_data(blocks)
    else:
        walker.walk_without_data(blocks)
    lifecycle.set_token_mask(None)
    if has_data and any(m.needs.after_walk for m in lifecycle.modifiers):
        replay, batches = partial(run_whole, walker, blocks.values()), len(walker.batches)
        log = walker.log
        state = state.but(replay=replay, batches=batches, interrupt=log.interrupt)
        state = state.but(store=log.store_training, restore=log.restore_training)
    lifecycle.emit(state, replace(clock, type_=EventType.CALIBRATION_END))
    if has_data:
        walker.compare_outputs(blocks)


def _without_idle_towers(walker: Walker, blocks: Mapping[str, nn.Module]) -> Mapping[str, nn.Module]:
    """The blocks without those in towers that no modifier looks at, so that batches may lack images.

    Blocks that the user named, or that lie on disk, stay as they are.
    """
    towers = find_towers(walker.model)
    if not towers or walker.options.blocks is not None or not isinstance(walker.residence, InMemory):
        return blocks
    hooked = {module for modifier in walker.lifecycle.modifiers for module in modifier.hooked}
    walked = {n: b for n, b in blocks.items() if not tower_of(n, towers) or hooked & set(b.modules())}
    if not walked:
        return blocks
    walker.total = len(walked) + 1
    return walked


@contextmanager
def _unreached_towers(model: nn.Module) -> Iterator[None]:
    """Warn afterwards of towers that no batch reached: statistics then lack the tokens of images or sounds."""
    towers = find_towers(model)
    reached: set[nn.Module] = set()
    hooks = [tower.register_forward_pre_hook(lambda module, _: reached.add(module)) for tower in towers.values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if names := [name for name, tower in towers.items() if tower not in reached]:
        warnings.warn(
            f"no calibration batch reached {', '.join(map(repr, names))} of this {type(model).__name__}: the batches "
            f"hold text alone, so that the statistics of its language model lack the tokens that images or sounds "
            f"become there; pass batches as the model's processor makes them from images and text (input_ids and "
            f"pixel_values)",
            stacklevel=3,
        )


def _survey(walker: Walker, blocks: Mapping[str, nn.Module]) -> None:
    """All batches through the dense model, for modifiers that need it; BLOCK_SURVEYED per block and for the rest."""
    lifecycle, model, residence = walker.lifecycle, walker.model, walker.residence
    surveying = [m for m in lifecycle.modifiers if m.needs.survey]
    known = set(map(id, walker.log.restore_survey()))
    if remaining := [m for m in surveying if id(m) not in known]:
        with ExitStack() as stack:
            stack.enter_context(residence.passing(blocks) if blocks else residence.visit("", model))
            for modifier in lifecycle.modifiers:
                if not any(modifier is one for one in remaining):
                    stack.enter_context(modifier.paused())
            _run_survey(walker, blocks, gradients_of(remaining, walker.options.seed, walker.state.user_loss))
        lifecycle.set_token_mask(None)
    if not known:
        walker.log.store_survey()
    surveyed = replace(walker.clock, type_=EventType.BLOCK_SURVEYED)
    groups = [(name, block, modules_of_block(name, block)) for name, block in blocks.items()]
    for name, block, modules in (*groups, ("", None, modules_outside(model, blocks))):
        lifecycle.emit(walker.state.but(block=block, block_name=name, modules=modules), surveyed, only=surveying)
    walker.log.interrupt()


def _run_survey(walker: Walker, blocks: Mapping[str, nn.Module], gradients: Gradients | None) -> None:
    """All batches of this rank through the dense model, and back where there are gradients."""
    model = walker.model
    for i, batch in enumerate(walker.batches):
        walker.report(f"survey of the dense model, batch {i + 1}/{len(walker.batches)}")
        mask = tree_move(token_mask(batch), walker.device or device_of(model))
        walker.lifecycle.set_token_mask(mask, walker.numbers[i])
        if gradients is None:
            walker.runner(batch)
            continue
        with gradients.enabled(model, blocks, walker.residence):
            gradients.run(walker.runner.own_output, tree_move(batch, device_of(model)), mask, walker.numbers[i])
    if gradients is not None:
        gradients.check(walker.state.team)


def _check_batches(modifiers: Sequence[Modifier], batches: Sequence[Any] | None) -> None:
    if batches is not None and len(batches) == 0:
        raise ValueError("batches is empty, expected at least one calibration batch; check what the loader yields")
    in_need = [m.name for m in modifiers if m.needs.data]
    if in_need and batches is None:
        raise ValueError(
            f"{', '.join(in_need)} needs calibration data and there are no batches; pass batches=[...], such as a few "
            f"batches of the training data"
        )
