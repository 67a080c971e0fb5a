"""``compress(model, modifiers, batches)``: the whole lifecycle on any ``nn.Module``, without a Trainer."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from lightning_compress.calibration.all_events import all_events
from lightning_compress.calibration.options import CalibrationOptions, Walk
from lightning_compress.calibration.sequential import calibrate
from lightning_compress.core import Ledger, Lifecycle, Modifier, State
from lightning_compress.core.interruption import check_uninterrupted, marked_when_interrupted
from lightning_compress.core.lifecycle import modifiers_in_order
from lightning_compress.export.guard import guard_save_pretrained
from lightning_compress.layers.matching import without_parallel
from lightning_compress.layers.split_experts import split_while
from lightning_compress.planning.make import make_plan
from lightning_compress.planning.plan import Plan
from lightning_compress.recipe import read_recipe
from lightning_compress.resume.folder_log import Resume, opened
from lightning_compress.team import Team

__all__ = ["check_team", "compress", "first_batches", "modifiers_of"]


@overload
def compress(
    model: nn.Module, modifiers: Modifier | Sequence[Modifier] | Mapping[str, Modifier] | str,
    batches: Iterable[Any] | None = None, *, forward: Callable[[nn.Module, Any], Any] | None = None,
    blocks: str | Sequence[str] | None = None, walk: Walk = "auto", max_batches: int | None = None,
    device: str | torch.device | None = None, offload_device: str | torch.device | None = "cpu",
    progress: Callable[[str, int, int], None] | None = None, seed: int = 0, moe_calibrate_all_experts: bool = False,
    memory_limit: int | str | None = None, cache_activations: str = "memory", log: str | Path | None = None,
    resume: Resume = "auto", team: Team = ..., loss: Callable[[nn.Module, Any], Tensor] | None = None,
    plan: Literal[True]
) -> Plan: ...  # fmt: skip


@overload
def compress(
    model: nn.Module, modifiers: Modifier | Sequence[Modifier] | Mapping[str, Modifier] | str,
    batches: Iterable[Any] | None = None, *, forward: Callable[[nn.Module, Any], Any] | None = None,
    blocks: str | Sequence[str] | None = None, walk: Walk = "auto", max_batches: int | None = None,
    device: str | torch.device | None = None, offload_device: str | torch.device | None = "cpu",
    progress: Callable[[str, int, int], None] | None = None, seed: int = 0, moe_calibrate_all_experts: bool = False,
    memory_limit: int | str | None = None, cache_activations: str = "memory", log: str | Path | None = None,
    resume: Resume = "auto", team: Team = ..., loss: Callable[[nn.Module, Any], Tensor] | None = None,
    plan: Literal[False] = False
) -> Ledger: ...  # fmt: skip


def compress(
    model: nn.Module,
    modifiers: Modifier | Sequence[Modifier] | Mapping[str, Modifier] | str,
    batches: Iterable[Any] | None = None,
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    blocks: str | Sequence[str] | None = None,
    walk: Walk = "auto",
    max_batches: int | None = None,
    device: str | torch.device | None = None,
    offload_device: str | torch.device | None = "cpu",
    progress: Callable[[str, int, int], None] | None = None,
    seed: int = 0,
    moe_calibrate_all_experts: bool = False,
    memory_limit: int | str | None = None,
    cache_activations: str = "memory",
    log: str | Path | None = None,
    resume: Resume = "auto",
    team: Team = Team(),  # noqa: B008  (frozen)
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    plan: bool = False,
) -> Ledger | Plan:
    """Compress a model in place.

    >>> model, batches = nn.Sequential(nn.Linear(128, 8)), [torch.randn(4, 128) for _ in range(3)]
    >>> ledger = compress(model, "gptq_w4", batches, max_batches=2)
    >>> len(model[0].weight[0].unique()) <= 16
    True

    The options of calibration are keywords here, and one object, ``CalibrationOptions``, below: this signature is
    public.

    Args:
        model: Any module, or DataParallel around it; it is changed in place. Afterwards its modes and the random state
            are as before.
        modifiers: One modifier, several in the order in which they act, several by name, or the name of a recipe
            (``"gptq_w4"``) or the path of a recipe file.
        batches: Calibration batches, such as a DataLoader; None for recipes that need no data.
        forward: ``forward(model, batch)`` runs the model on a batch; by default a mapping gives keyword arguments, of a
            tuple or list the first item is the input, and anything else is the input.
        blocks: As in :class:`lightning_compress.calibration.options.CalibrationOptions`, like ``walk``, ``device``,
            ``offload_device``, ``seed``, ``moe_calibrate_all_experts``, ``memory_limit`` and ``cache_activations``.
        walk: ``auto``, ``one_pass``, ``two_pass`` or ``whole``.
        max_batches: Largest number of batches that are used; required when ``batches`` never ends.
        device: Device that each block is moved to for its turn.
        offload_device: Device on which the inputs of blocks are stored.
        progress: Called with a text, the number of finished blocks and the number of all blocks.
        seed: Seed of torch's random state during the run.
        moe_calibrate_all_experts: Statistics of experts that share one tensor use all tokens.
        memory_limit: Bytes, or such as ``"16GB"``, that ``walk="auto"`` may use beside the model.
        cache_activations: Where the inputs of blocks are stored: ``memory``, ``disk`` or the path of a folder.
        log: Folder of a log of finished blocks; the same call goes on from there after a kill, with the same result bit
            for bit. It stays: remove it when the model is saved.
        resume: ``auto``: go on where a log is there. ``must``: there must be one. ``never``: begin anew.
        team: With ``Team.of_processes()`` (lightning_compress.team) the processes of the default group calibrate
            together: each calls this with the same model and batches, runs its share of the batches, and ends with the
            same result, bit for bit that of a single process.
        loss: ``loss(model, batch)``, a tensor with one number, for modifiers with ``objective="training_step"``.
        plan: Change nothing, and return what the call would do and take: see lightning_compress.planning.

    Returns:
        The ledger, a row for each module and technique; with ``plan`` a :class:`~lightning_compress.Plan`, whose text
        is its ``str``.

    Raises:
        ValueError: No batches although a modifier needs them, none in ``batches``, a model whose compression was
            interrupted before, an argument that a modifier or the walk refuses, or a log of another recipe, model or
            data, which the message names.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}, expected an nn.Module")
    model = without_parallel(model)
    options = CalibrationOptions(
        blocks, walk, device, offload_device, seed, moe_calibrate_all_experts, memory_limit,
        cache_activations=cache_activations,
    )  # fmt: skip
    lifecycle = Lifecycle(modifiers_of(modifiers))
    batches = first_batches(batches, max_batches)
    if plan:
        sample, count = (None, 0) if batches is None else (batches[0], len(batches))
        return make_plan(model, lifecycle.modifiers, sample, count, options, forward=forward)
    state = State(model=model, ledger=Ledger(), team=team, user_loss=_with_model(loss, model))
    check_team(lifecycle, team)
    if loss is not None and not any(m.needs.gradients == "training_step" for m in lifecycle.modifiers):
        raise ValueError("loss is given, and no modifier has objective='training_step', so that nothing would use it")
    check_uninterrupted(model)
    mixtures = nullcontext() if lifecycle.windowed else split_while(model)
    marked = marked_when_interrupted(model, lambda: len(state.ledger))
    with team.one_voice(), opened(log, resume) as group_log, mixtures, marked, all_events(lifecycle, state, seed):
        if any(m.needs.calibration for m in lifecycle.modifiers):
            calibrate(lifecycle, state, batches, options, forward=forward, progress=progress, log=group_log)
    guard_save_pretrained(model)
    return state.ledger


def _with_model(
    loss: Callable[[nn.Module, Any], Tensor] | None, model: nn.Module
) -> Callable[[Any, int], Tensor | None] | None:
    return None if loss is None else lambda batch, number: loss(model, batch)


def modifiers_of(modifiers: Modifier | Sequence[Modifier] | Mapping[str, Modifier] | str) -> Sequence[Modifier]:
    """The modifiers of a recipe, in order; ``modifiers`` as in :func:`compress`."""
    if not isinstance(modifiers, str):
        return modifiers_in_order(modifiers)
    recipe = read_recipe(modifiers)
    if recipe.arguments:
        raise ValueError(
            f"the recipe {modifiers!r} sets {recipe.arguments} for CompressionCallback: give compress() "
            f"load_recipe({modifiers!r}), and those of these settings that it has as arguments"
        )
    return recipe.modifiers


def first_batches(batches: Iterable[Any] | None, max_batches: int | None) -> list[Any] | None:
    """The first ``max_batches`` batches."""
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches={max_batches}, expected at least 1, or None for all")
    if batches is None:
        return None
    if isinstance(batches, (Tensor, Mapping, str)):
        raise ValueError(f"batches is one {type(batches).__name__}, expected an iterable of batches; pass [batch]")
    first = list(islice(batches, max_batches))
    if not first:
        raise ValueError(
            "batches yields nothing, expected at least one calibration batch; check the length of the data set, "
            "drop_last, and whether an iterator was used up before"
        )
    if max_batches is not None and len(first) < max_batches:
        warnings.warn(f"max_batches={max_batches}, but there are only {len(first)}: all of them are used", stacklevel=3)
    return first


def check_team(lifecycle: Lifecycle, team: Team) -> None:
    """ValueError for modifiers that cannot calibrate in a team of several ranks."""
    alone = [m.name for m in lifecycle.modifiers if m.needs.calibration and m.needs.team == "alone"]
    if alone and not team.alone:
        raise ValueError(
            f"{', '.join(alone)} must see all batches, and cannot calibrate in a team of {team.size} ranks; leave "
            f"team out (each rank then computes all), or train with a Trainer, where rank 0 calibrates for all"
        )
