"""``compress_folder(source, target, modifiers, batches)``: a model of transformers that is larger than memory.

The model is built on the meta device. Each block is read for the probe, which recipes without data do not need, and for
its turn, then written and released; modules outside of blocks (embeddings, norms, the head) stay in memory:

    source/*.safetensors  ->  block in memory, compressed as in memory  ->  .<target>.partial/model-00001-of-00025...

The shards become the export when the last one is written, and a killed run goes on with them (resume/export_log.py).
Tensors and other files are those of ``save(model, target, tokenizer=..., recipe=...)`` after ``compress(model, ...)``.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_compress.calibration.all_events import all_events
from lightning_compress.calibration.blocks import find_blocks
from lightning_compress.calibration.options import CalibrationOptions
from lightning_compress.calibration.residence import OnDisk, exact_device
from lightning_compress.calibration.sequential import calibrate
from lightning_compress.calibration.walk_memory import megabytes
from lightning_compress.core import Ledger, Lifecycle, Modifier, State
from lightning_compress.export import hugging_face
from lightning_compress.export.rehearsal import rehearse
from lightning_compress.export.tensor_file import TensorFolder
from lightning_compress.export.tensors import read_json
from lightning_compress.files.atomic_folder import check_target
from lightning_compress.layers.memory import bytes_of, small_heap
from lightning_compress.layers.split_experts import fused_experts
from lightning_compress.layers.tied_weights import owners_of
from lightning_compress.oneshot import check_team, first_batches, modifiers_of
from lightning_compress.resume.export_log import ExportLog
from lightning_compress.resume.folder_log import Resume, check_resume
from lightning_compress.team import Team

__all__ = ["WholeModelNeeded", "compress_folder"]

MAPPED = 2**23  # bytes; pieces of memory above it go back to the system when they are freed
REUSED = 2**26  # bytes of the heap that rounding without data uses again, layer after layer: a third less CPU time
IN_MEMORY = "compress the model in memory, with lightning_compress.compress, then save it"


class WholeModelNeeded(ValueError):
    """The model or the recipe does not work block by block, while ``compress`` in memory may take it."""


def compress_folder(
    source: str | Path,
    target: str | Path,
    modifiers: Modifier | Sequence[Modifier] | Mapping[str, Modifier] | str,
    batches: Iterable[Any] | None = None,
    *,
    options: CalibrationOptions = CalibrationOptions(),  # noqa: B008  (frozen)
    dtype: torch.dtype | None = None,
    memory: int | str | None = None,
    overwrite: bool = False,
    resume: Resume = "auto",
    progress: Callable[[str, int, int], None] | None = None,
    team: Team = Team(),  # noqa: B008  (frozen)
) -> Ledger:
    """Compress a model of transformers from folder to folder, with one block in memory at a time.

    Args:
        source: Folder of a dense model, in safetensors files, as ``save_pretrained`` writes it.
        target: Folder to write; missing parents are made.
        modifiers: As in :func:`lightning_compress.compress`; modifiers that act on the whole model at once are refused.
        batches: Calibration batches; None for recipes that need no data.
        options: How calibration goes through the model.
        dtype: That of the model; by default the one of its config.
        memory: Bytes for weights and activations, or such as ``"300MB"``: what a block leaves of it is the
            ``memory_limit`` of the options, and a model whose largest block does not fit is refused.
        overwrite: Replace an earlier export of that name.
        resume: ``auto``: after a kill the same call goes on after the last block that it wrote, with the same result.
            ``must``: there must be such blocks. ``never``: begin anew.
        progress: Called with a text, the number of finished blocks and the number of all blocks.
        team: With ``Team.of_processes()`` the processes of the default group work together, each calls this with the
            same arguments, and the files are those of one process. On batches they share the batches; without batches
            they share the blocks. ``target`` lies on a file system that all of them see.

    Returns:
        The ledger: a row for each module and technique.

    Raises:
        ValueError: The folder is not such a model, its blocks are not one chain, a killed run had another recipe, model
            or data, or what ``compress`` and ``save`` refuse.
        WholeModelNeeded: A modifier or the model needs the whole model in memory; a ValueError, before any work.
    """
    check_resume(resume)
    source = Path(source).expanduser().resolve()
    lifecycle = Lifecycle(modifiers_of(modifiers))
    _check_modifiers(lifecycle.modifiers)
    check_team(lifecycle, team)
    with _told_to(team):
        batches = first_batches(batches, None)
        files = TensorFolder(source)
        model = hugging_face.on_meta(source, len(files.files), _dtype(source, files, dtype))
        processors = hugging_face.processors(source)
        rehearse(model, processors)
        blocks = find_blocks(model, options.blocks)
        names = team.result(partial(_check_model, source, model, files, blocks), "checking the model")
        if memory is not None:
            options = replace(options, memory_limit=bytes_of(memory) - _block_bytes(model, blocks, bytes_of(memory)))
        target = team.result(partial(check_target, target, overwrite=overwrite), "checking the target")
        options = options.cached_in(target.parent)
        shares = batches is None  # then blocks do not depend on each other, and no modifier needs other ranks
        state = State(model=model, ledger=Ledger(), team=Team() if shares else team)
        log = ExportLog(model, blocks, files, names, target, overwrite, resume, team, shares)
        try:
            heap = small_heap(keep=REUSED) if shares else small_heap(MAPPED)
            with heap, all_events(lifecycle, state, options.seed):
                residence = OnDisk(files.read, exact_device(options.device), log.elsewhere)
                calibrate(lifecycle, state, batches, options, progress=progress, residence=residence, log=log)
            team.result(partial(log.finish, processors), "writing the export")
        finally:
            log.close()
    return state.ledger


@contextmanager
def _told_to(team: Team) -> Iterator[None]:
    """An error inside is raised on all ranks."""
    try:
        yield
    except BaseException as error:
        team.fail(error)
        raise


# -- checks before the work -------------------------------------------------------------------------------------------


def _check_modifiers(modifiers: Sequence[Modifier]) -> None:
    """WholeModelNeeded for modifiers that do not work block by block."""
    for modifier in modifiers:
        needs, reason = modifier.needs, None
        if modifier.start is not None or needs.hand_over or not (needs.calibration or modifier.handles_training_end):
            reason = "acts during training"
        elif needs.survey:
            reason = "looks at the whole dense model before the first block"
        elif modifier.handles_training_end or needs.changes_shapes or needs.after_walk:
            reason = "acts on the whole model at once"
        if reason is not None:
            raise WholeModelNeeded(
                f"{modifier.name} {reason}, so that it cannot work on one block after another; leave it out, or "
                f"{IN_MEMORY}"
            )


def _check_model(source: Path, model: Any, files: TensorFolder, blocks: Mapping[str, nn.Module]) -> Mapping[str, str]:
    """The names of the tensors of a model on disk; WholeModelNeeded where it cannot be compressed block by block."""
    kind = type(model).__name__
    if not blocks:
        raise WholeModelNeeded(f"{source}: no repeated blocks in {kind}; name them with blocks=[...], or {IN_MEMORY}")
    if experts := fused_experts(model):
        raise WholeModelNeeded(f"{source}: {next(iter(experts))!r} holds all its experts in one tensor; {IN_MEMORY}")
    for owners in owners_of(model).values():
        groups = {next((block for block in blocks if name.startswith(f"{block}.")), "") for name in owners}
        if len(groups) > 1:
            raise WholeModelNeeded(f"{source}: {' and '.join(owners)} share a weight, in different blocks; {IN_MEMORY}")
    try:
        names = hugging_face.saved_names(model)
    except Exception as error:  # conversions of weights that are not there
        raise WholeModelNeeded(
            f"{source}: the names of the weights of {kind} cannot be told: {error}; {IN_MEMORY}"
        ) from error
    renamed = {name: on_disk for on_disk, name in names.items() if name != on_disk}
    if renamed or (missing := sorted(names.keys() - files.files.keys())):
        example = (
            f"{next(iter(renamed))!r} is {next(iter(renamed.values()))!r}" if renamed else f"{missing[0]!r} is absent"
        )
        raise WholeModelNeeded(
            f"{source}: the tensors of {kind} have other names or parts in its files ({example}); {IN_MEMORY}"
        )
    state = model.state_dict(keep_vars=True)
    for name in state.keys() & files.files.keys() - names.keys():
        other = next((n for n in names if state[n] is state[name]), None)
        if other is not None and not torch.equal(files.read(name), files.read(other)):
            raise WholeModelNeeded(
                f"{source}: {name!r} and {other!r} are one weight in {kind}, and two in its files; {IN_MEMORY}"
            )
    return names


def _block_bytes(model: nn.Module, blocks: Mapping[str, nn.Module], memory: int) -> int:
    """Bytes while the largest block is compressed, without activations and statistics; ValueError where it exceeds.

    That is the block, all modules outside of blocks, and four copies of the largest weight in float32.
    """
    sizes = [sum(p.numel() * p.itemsize for p in block.parameters()) for block in blocks.values()]
    outside = sum(p.numel() * p.itemsize for p in model.parameters()) - sum(sizes)
    largest = max(p.numel() for block in blocks.values() for p in block.parameters())
    needed = max(sizes) + outside + 16 * largest
    if needed > memory:
        raise ValueError(
            f"memory={megabytes(memory)}, and a block takes about {megabytes(needed)}: {megabytes(max(sizes))} for its "
            f"weights, {megabytes(outside)} for the modules outside of blocks, and four float32 copies of its largest "
            f"weight; give more"
        )
    return needed


def _dtype(source: Path, files: TensorFolder, dtype: torch.dtype | None) -> torch.dtype:
    """That of the model, as ``from_pretrained`` chooses it."""
    config = read_json(source / "config.json")
    if "quantization_config" in config:
        raise ValueError(f"{source} is quantized already: start from the folder of the dense model")
    name = config.get("dtype") or config.get("torch_dtype")
    stored = (file.dtype(name) for name, file in files.files.items())
    named = getattr(torch, name, None) if isinstance(name, str) else next(t for t in stored if t.is_floating_point)
    dtype = named if dtype is None else dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype or name!r}: expected a dtype such as torch.bfloat16")
    return dtype
