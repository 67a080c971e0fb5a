"""``compress_folder(source, target, modifiers, batches)``: a model of transformers that is larger than memory.

The model is built on the meta device. Modules outside of blocks (embeddings, norms, the head) are in memory throughout;
each block is read for the probe, which recipes without data do not need, and for its turn, then written and released:

    source/*.safetensors  ->  block in memory, compressed as in memory  ->  .<target>.partial/model-00001-of-00025...

The shards become the export when the last one is written (export/stream.py). Tensors and other
files are those of ``save(model, target, tokenizer=..., recipe=...)`` after ``compress(model, ...)``.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_compress.calibration.blocks import find_blocks, modules_of_block
from lightning_compress.calibration.options import CalibrationOptions
from lightning_compress.calibration.residence import OnDisk, exact_device, fill
from lightning_compress.calibration.sequential import calibrate
from lightning_compress.core import Ledger, Lifecycle, Modifier, State
from lightning_compress.export import hugging_face
from lightning_compress.export.contents import Contents, block_contents, contents_of, warn_of_contents
from lightning_compress.export.rehearsal import rehearse
from lightning_compress.export.save import dump_yaml, write_description
from lightning_compress.export.state_on_disk import state_on_disk
from lightning_compress.export.stream import ShardWriter
from lightning_compress.export.tensor_file import TensorFolder
from lightning_compress.export.tensors import INDEX, read_json
from lightning_compress.layers.finite import nonfinite
from lightning_compress.layers.matching import shortlist
from lightning_compress.layers.split_experts import fused_experts
from lightning_compress.layers.tied_weights import owners_of
from lightning_compress.oneshot import all_events, first_batches, modifiers_of
from lightning_compress.quant.packing import check_fit
from lightning_compress.recipe import dump_recipe

__all__ = ["compress_folder"]

IN_MEMORY = "compress the model in memory, with lightning_compress.compress, then save it"


def compress_folder(
    source: str | Path,
    target: str | Path,
    modifiers: Modifier | Sequence[Modifier] | Mapping[str, Modifier] | str,
    batches: Iterable[Any] | None = None,
    *,
    options: CalibrationOptions = CalibrationOptions(),  # noqa: B008  (frozen)
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Ledger:
    """Compress a model of transformers from folder to folder, with one block in memory at a time.

    Args:
        source: Folder of a dense model, in safetensors files, as ``save_pretrained`` writes it.
        target: Folder to write; missing parents are made.
        modifiers: As in :func:`lightning_compress.compress`; modifiers that act on the whole model at once are refused.
        batches: Calibration batches; None for recipes that need no data.
        options: How calibration goes through the model.
        dtype: That of the model; by default the one of its config.
        overwrite: Replace an earlier export of that name.

    Returns:
        The ledger: a row for each module and technique.

    Raises:
        ValueError: The folder is not such a model, its blocks are not one chain, a modifier needs the whole model, or
            what ``compress`` and ``save`` refuse.
    """
    source = Path(source).expanduser().resolve()
    lifecycle = Lifecycle(modifiers_of(modifiers))
    _check_modifiers(lifecycle.modifiers)
    recipe = dump_yaml(dump_recipe(lifecycle.modifiers))
    batches = first_batches(batches, None)
    files = TensorFolder(source)
    model = hugging_face.on_meta(source, len(files.files), _dtype(source, files, dtype))
    processors = hugging_face.processors(source)
    rehearse(model, processors)
    blocks = find_blocks(model, options.blocks)
    names = _check_model(source, model, files, blocks)
    writer = ShardWriter(target, len(blocks) + 1, overwrite=overwrite)
    writer.discard()
    export = _Export(model, blocks, names, writer)
    state = State(model=model, ledger=Ledger())
    fill(model, "", files.read, {module for block in blocks.values() for module in block.modules()})
    residence = OnDisk(files.read, export.store_block, exact_device(options.device))
    with all_events(lifecycle, state, options.seed):
        calibrate(lifecycle, state, batches, options, residence=residence)
    export.finish(processors, recipe)
    return state.ledger


class _Export:
    """Writes what ``save`` would write, block after block."""

    def __init__(self, model: Any, blocks: Mapping[str, nn.Module], names: Iterable[str], writer: ShardWriter):
        self.model, self.blocks, self.writer = model, blocks, writer
        self.left_out = model.state_dict().keys() - names  # tied weights, and what the class does not save
        self.dense: dict[str, Any] = {}  # records of modules whose weight stays dense on disk

    def store_block(self, name: str, block: nn.Module) -> None:
        """Write a block that is compressed."""
        contents = block_contents(self.model, modules_of_block(name, block))
        self._write(1 + list(self.blocks).index(name), block, contents, lambda key: key.startswith(f"{name}."))

    def finish(self, processors: Sequence[Any], recipe: str) -> None:
        """Write the modules outside of blocks and all other files; the folder gets its name."""
        contents = contents_of(self.model, {})
        inside = tuple(f"{name}." for name in self.blocks)
        outside = {name: pair for name, pair in contents.records.items() if not name.startswith(inside)}
        rest = replace(contents, records=outside, caches={})
        self._write(self.writer.count, self.model, rest, lambda key: not key.startswith(inside))
        warn_of_contents(contents)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            hugging_face.write_configs(self.model, folder)
            write_description(contents, folder, {name: name for name in contents.records}, self.dense)
            for processor in processors:
                processor.save_pretrained(folder)
            (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
            for path in sorted(folder.iterdir()):
                if path.suffix != ".safetensors" and path.name != INDEX:
                    shutil.move(path, self.writer.folder / path.name)
        self.writer.finish()

    def _write(self, number: int, module: nn.Module, contents: Contents, belongs: Callable[[str], bool]) -> None:
        if broken := nonfinite(module):
            raise ValueError(
                f"NaN or Inf in {len(broken)} parameters or buffers, such as {shortlist(broken)}; such a model is not "
                f"exported"
            )
        dense = {name: contents.records[name] for name in contents.dense if name in contents.records}
        for name, pair in dense.items():
            check_fit(name, *pair)
        state = state_on_disk(contents)
        tensors = {key: value for key, value in state.items() if belongs(key) and key not in self.left_out}
        records = {name: record.to_json() for name, (_, record) in dense.items()}
        self.writer.write(number, tensors, {"dense": records})
        self.dense |= records


# -- checks before the work -------------------------------------------------------------------------------------------


def _check_modifiers(modifiers: Sequence[Modifier]) -> None:
    """ValueError for modifiers that do not work block by block."""
    for modifier in modifiers:
        needs, reason = modifier.needs, None
        if modifier.start is not None or needs.hand_over or not (needs.calibration or modifier.handles_training_end):
            reason = "acts during training"
        elif needs.survey:
            reason = "looks at the whole dense model before the first block"
        elif modifier.handles_training_end or needs.changes_shapes:
            reason = "acts on the whole model at once"
        if reason is not None:
            raise ValueError(
                f"{modifier.name} {reason}, so that it cannot work on one block after another; leave it out, or "
                f"{IN_MEMORY}"
            )


def _check_model(source: Path, model: Any, files: TensorFolder, blocks: Mapping[str, nn.Module]) -> Mapping[str, str]:
    """ValueError for models that cannot be compressed block by block; returns the names of their tensors on disk."""
    kind = type(model).__name__
    if not blocks:
        raise ValueError(f"{source}: no repeated blocks in {kind}; name them with blocks=[...], or {IN_MEMORY}")
    if experts := fused_experts(model):
        raise ValueError(f"{source}: {next(iter(experts))!r} holds all its experts in one tensor; {IN_MEMORY}")
    for owners in owners_of(model).values():
        groups = {next((block for block in blocks if name.startswith(f"{block}.")), "") for name in owners}
        if len(groups) > 1:
            raise ValueError(f"{source}: {' and '.join(owners)} share a weight, in different blocks; {IN_MEMORY}")
    try:
        names = hugging_face.saved_names(model)
    except Exception as error:  # conversions of weights that are not there
        raise ValueError(
            f"{source}: the names of the weights of {kind} cannot be told: {error}; {IN_MEMORY}"
        ) from error
    renamed = {name: on_disk for on_disk, name in names.items() if name != on_disk}
    if renamed or (missing := sorted(names.keys() - files.files.keys())):
        example = (
            f"{next(iter(renamed))!r} is {next(iter(renamed.values()))!r}" if renamed else f"{missing[0]!r} is absent"
        )
        raise ValueError(
            f"{source}: the tensors of {kind} have other names or parts in its files ({example}); {IN_MEMORY}"
        )
    state = model.state_dict(keep_vars=True)
    for name in state.keys() & files.files.keys() - names.keys():
        other = next((n for n in names if state[n] is state[name]), None)
        if other is not None and not torch.equal(files.read(name), files.read(other)):
            raise ValueError(
                f"{source}: {name!r} and {other!r} are one weight in {kind}, and two in its files; {IN_MEMORY}"
            )
    return names


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
