"""Make a plan: set-up on a copy without weights, sizes from schemes, seconds and memory from trials."""

import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from compressed_tensors.quantization import QuantizationScheme
from torch import nn

from lightning_compress.calibration.blocks import find_blocks
from lightning_compress.calibration.options import CalibrationOptions
from lightning_compress.core import Ledger, Lifecycle, Modifier, State
from lightning_compress.export.rehearsal import rehearse
from lightning_compress.layers.matching import clean_name, listed, match_rank
from lightning_compress.layers.matrix import is_embedding, weight_of
from lightning_compress.layers.memory import resident
from lightning_compress.layers.module_weights import ModuleWeight, reveal, weights_inside
from lightning_compress.layers.split_experts import split_while
from lightning_compress.layers.towers import find_towers, tower_of
from lightning_compress.planning.copies import without_weights
from lightning_compress.planning.plan import Plan, PlannedModule
from lightning_compress.planning.readers import readers_of
from lightning_compress.planning.sizes import dense_reasons, model_bytes, packed_bytes
from lightning_compress.planning.trial import Estimate, estimate
from lightning_compress.quant.arguments import ALLOCATED, QuantizationArguments
from lightning_compress.quant.schemes import describe

__all__ = ["make_plan"]


def make_plan(
    model: nn.Module,
    modifiers: Sequence[Modifier],
    batch: Any = None,
    batches: int = 16,
    options: CalibrationOptions = CalibrationOptions(),  # noqa: B008  (frozen)
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    processors: Sequence[Any] = (),
    eval_batches: int = 0,
) -> Plan:
    """Plan a run; the model and the modifiers stay as they are.

    Args:
        model: In memory, or with blanks on the meta device.
        modifiers: Not initialized.
        batch: One calibration batch; None: nothing is tried, so that neither seconds nor memory are known.
        batches: How many the run will use.
        options: How it will calibrate.
        forward: As in :func:`lightning_compress.compress`.
        processors: What will be exported with the model.
        eval_batches: Batches that the run will measure the model on, before and after.
    """
    recipe, kind = tuple(modifier.name for modifier in modifiers), type(model).__name__
    refusals, texts, planned = _set_up(model, modifiers, options, processors)
    if refusals:
        return Plan(recipe, kind, refusals=tuple(refusals), warnings=tuple(texts))
    modules, left_out = _modules(model, modifiers, planned)
    before = model_bytes(model)
    sized = [module for module in modules if module.scheme]
    saved = sum(module.bytes_before - module.bytes_after for module in sized)
    unknown = []
    if cuts := [modifier.name for modifier in modifiers if modifier.needs.changes_shapes]:
        unknown.append(f"sizes after the cuts of {', '.join(cuts)}")
    if chosen := [m.name for m in modifiers if isinstance(m, QuantizationArguments) and m.scheme == ALLOCATED]:
        unknown.append(f"schemes and sizes of {', '.join(chosen)}: data decides; those shown are the largest")
    if trained := [modifier.name for modifier in modifiers if not _is_tried(modifier)]:
        why = "they act during training, cut the model, or take the user's loss"
        unknown.append(f"seconds and memory of {', '.join(trained)}: {why}")
    seconds: dict[str, float] = {}
    memory = {"model": before}
    tried = [modifier for modifier in modifiers if _is_tried(modifier)]
    needs_data = any(modifier.needs.data for modifier in tried)
    if needs_data and batch is None:
        unknown.append("seconds and memory of calibration: no batch to try; give batches")
    elif tried:
        estimated = _estimate(model, tried, batch if needs_data else None, batches, options, forward)
        if isinstance(estimated, str):
            unknown.append(f"seconds and memory of calibration: {estimated}")
        else:
            measuring = {f"metric {when}": eval_batches * estimated.forward for when in ("before", "after")}
            seconds = {"calibration": estimated.calibration, "export": estimated.export}
            seconds |= measuring if eval_batches else {}
            memory |= {"calibration": estimated.memory, "peak": _loaded(model) + estimated.memory}
    sizes = [(8 * module.bytes_after, module.params) for module in sized if not module.note]
    bits = sum(b for b, _ in sizes) / sum(p for _, p in sizes) if sizes else None
    return Plan(
        recipe, kind, modules=tuple(modules), left_out=left_out, warnings=tuple(texts), bytes_before=before,
        bytes_after=None if cuts or chosen else before - saved, bits_per_weight=bits,
        blocks=len(find_blocks(model, options.blocks)) if options.walk != "whole" else 0,
        batches=batches if needs_data else 0, seconds=seconds, memory=memory,
        readers=readers_of(model, modifiers, planned), unknown=tuple(unknown),
    )  # fmt: skip


def _is_tried(modifier: Modifier) -> bool:
    """Whether it acts on a small copy as on the model: the user's own loss knows the model alone."""
    needs_model = modifier.needs.changes_shapes or modifier.needs.gradients == "training_step"
    return modifier.start is None and modifier.acts_after_training and not needs_model


def _loaded(model: nn.Module) -> int:
    """Bytes of this process with the model in memory."""
    blank = sum(parameter.nbytes for parameter in model.parameters() if parameter.is_meta)
    return (resident() or 0) + blank


def _estimate(model: nn.Module, *arguments: Any) -> Estimate | str:
    """An error in a trial is one that the run would have, too, or that comes from the small model."""
    with warnings.catch_warnings(), _silent_logger():
        warnings.simplefilter("ignore")  # those of set-up are in the plan, others are about the small model
        try:
            return estimate(model, *arguments)
        except Exception as error:
            return f"a trial failed: {type(error).__name__}: {error}"


@contextmanager
def _silent_logger() -> Iterator[None]:
    """Inside, this package logs warnings only."""
    logger = logging.getLogger(__name__.partition(".")[0])
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def _set_up(
    model: nn.Module, modifiers: Sequence[Modifier], options: CalibrationOptions, processors: Sequence[Any]
) -> tuple[list[str], list[str], dict[str, QuantizationScheme]]:
    """Refusals, warnings, and the scheme of each module, from set-up on a copy without weights."""
    refusals: list[str] = []
    planned: dict[str, QuantizationScheme] = {}

    def attempt(action: Callable[[], Any]) -> bool:
        try:
            action()
        except (ValueError, RuntimeError, NotImplementedError) as error:
            if str(error) not in refusals:
                refusals.append(str(error))
            return False
        return True

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        copies = [modifier.model_copy(deep=True) for modifier in modifiers]
        if attempt(lambda: _initialize(model, copies)):
            for modifier in copies:
                planned |= modifier.planned if isinstance(modifier, QuantizationArguments) else {}
        elif len(modifiers) > 1:  # the first error hides those of other modifiers
            for modifier in modifiers:
                attempt(partial(_initialize, model, [modifier.model_copy(deep=True)]))
        attempt(lambda: rehearse(model, processors))
        if options.blocks is not None:
            attempt(lambda: find_blocks(model, options.blocks))
    texts = list(dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning)))
    return refusals, texts, planned


def _initialize(model: nn.Module, modifiers: Sequence[Modifier]) -> None:
    copied, lifecycle = without_weights(model), Lifecycle(modifiers)
    with nullcontext() if lifecycle.windowed else split_while(copied):
        lifecycle.initialize(State(model=copied, ledger=Ledger()))


def _modules(
    model: nn.Module, modifiers: Sequence[Modifier], planned: Mapping[str, QuantizationScheme]
) -> tuple[list[PlannedModule], dict[str, str]]:
    """Modules that modifiers will work on, in the model's order, and why others are left out."""
    copied = without_weights(model)
    with nullcontext() if Lifecycle(modifiers).windowed else split_while(copied):
        state = State(model=copied, ledger=Ledger())
        work: dict[str, list[str]] = {}
        for modifier in modifiers:
            claimed = {clean_name(name): what for name, what in modifier.claims(state).items()}
            for name in sorted(clean_name(name) for name in modifier.touches(state)):
                work.setdefault(name, []).append(claimed.get(name, modifier.name.removesuffix("Modifier")))
        reveal(copied, lambda name, _: clean_name(name) in work)
        named = {clean_name(name): module for name, module in copied.named_modules()}
        towers = {clean_name(name) for name in find_towers(copied)}
        sizes = {name: packed_bytes(named[name], scheme) for name, scheme in planned.items()}
        dense = dense_reasons(copied, planned)
        rows = []
        for name in (name for name in named if name in work and _holds_weight(named[name])):
            weight = weight_of(named[name])
            after = weight.nbytes if name in dense or name not in sizes else sizes[name]
            scheme = describe(planned[name]) if name in planned else ""
            kind, what = _kind(named[name]), ", ".join(dict.fromkeys(work[name]))
            rows.append(
                PlannedModule(name, kind, what, scheme, weight.numel(), weight.nbytes, after, dense.get(name, ""))
            )
        left = {
            name: _reason(name, module, modifiers, towers)
            for name, module in named.items()
            if not (name in work or weights_inside(module)) and _holds_matrix(module)
        }
    return rows, left


def _holds_weight(module: nn.Module) -> bool:
    return getattr(module, "weight", None) is not None


def _kind(module: nn.Module) -> str:
    """Its class; of a weight of an LSTM or another module of that kind, the class of that."""
    return type(module.home if isinstance(module, ModuleWeight) else module).__name__


def _holds_matrix(module: nn.Module) -> bool:
    return any(parameter.ndim > 1 for parameter in module.parameters(recurse=False))


def _reason(name: str, module: nn.Module, modifiers: Sequence[Modifier], towers: Collection[str]) -> str:
    """Why no modifier works on a module that holds a matrix."""
    for modifier in modifiers:
        for entry in listed(getattr(modifier, "ignore", [])):
            if match_rank(name, module, entry):
                return f"in ignore, as {entry}"
    if is_embedding(module):
        return "an embedding, which targets do not name"
    if (tower := tower_of(name, towers)) is not None:
        return f"in {tower}, which turns images or sounds into tokens, and which targets do not name"
    return f"targets do not name it, nor the class {type(module).__name__}"
