"""``lightning-compress run FOLDER RECIPE --data TEXT --out FOLDER``: a model on disk, compressed on a text file."""

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_compress.cli.plan import add_data_sizes

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_compress.core import Ledger, Modifier

__all__ = ["DESCRIPTION", "SUMMARY", "act", "add_arguments"]

PHASE = "calibration and export"  # each block is written when it is finished
SUMMARY = "compress a model of transformers on disk"
DESCRIPTION = """Compress the model in FOLDER by a recipe, and write what transformers and vLLM load into the folder of
--out. Prints the plan first, then the progress, then a table with the plan beside the facts. The report (summary.json,
modules.csv, index.html) is in a folder beside --out whose name ends in -report.

One block of the model is in memory at a time. A recipe that acts on the whole model at once, and a model that is not a
chain of blocks, are compressed in memory. After a kill the same command goes on after the last finished block.

FOLDER holds a dense model in safetensors files, as save_pretrained writes it. RECIPE is a name such as gptq_w4, or the
path of a recipe file. The text is tokenized by the tokenizer of FOLDER; its rows are spread over the file. Of a .jsonl
file the key "text" of each line counts. Exit code: 0; 1 if the recipe is refused; 2 for an error.

    lightning-compress run ./SmolLM2 gptq_w4 --data wiki.txt --out ./SmolLM2-W4
    lightning-compress run ./SmolLM2 rtn_w8 --out ./SmolLM2-W8          # needs no data"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the subcommand."""
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("--out", metavar="FOLDER", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--data", metavar="TEXT_FILE", default="none", help="text for calibration; none (default) for recipes without"
    )
    add_data_sizes(parser)
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="random state of calibration (default: 0)")
    parser.add_argument("--device", metavar="NAME", help="device that each block is moved to, such as cuda")
    parser.add_argument("--memory", metavar="SIZE", help="such as 8GB: refuse a model whose largest block exceeds it")
    parser.add_argument("--dtype", metavar="NAME", help="dtype of the model, such as bfloat16; default: of its config")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export of that name")
    parser.add_argument(
        "--resume", choices=("auto", "must", "never"), default="auto", help="whether to go on after a kill"
    )


def act(options: argparse.Namespace) -> int:
    """Plan, compress and report; returns the exit code."""
    from lightning_compress.files.atomic_folder import check_target
    from lightning_compress.planning.folder import plan_folder
    from lightning_compress.recipe import read_recipe

    if options.out.is_dir() and any(options.out.iterdir()) and not options.overwrite:
        raise ValueError(f"{options.out} exists and is not empty; choose another, or replace an export by --overwrite")
    recipe = read_recipe(options.recipe)
    if options.folder.resolve() == options.out.resolve():
        raise ValueError(f"--out {options.out} is the folder of the dense model; choose another")
    target = check_target(options.out, overwrite=options.overwrite)
    if recipe.arguments:
        print(f"without effect, as they are for a Trainer: {', '.join(recipe.arguments)} of the recipe")
    modifiers = recipe.modifiers
    _check_modifiers(modifiers)
    batches = _batches(options, modifiers)
    sizes = options.batches, options.rows, options.tokens
    plan = plan_folder(options.folder, options.recipe, *sizes, dtype=_dtype(options.dtype))
    plan = replace(plan, seconds={PHASE: sum(plan.seconds.values())} if plan.seconds else {})
    plan.show()
    if plan.refusals:
        return 1
    began = time.monotonic()
    kind, ledger = _compress(options, target, modifiers, batches)
    facts = {
        "model": plan.model,
        "recipe": options.recipe,
        "plan": plan.to_json(),
        "model_bytes_before": plan.bytes_before,
        "seconds": {PHASE: time.monotonic() - began},
        "seed": options.seed,
        "memory": kind,
        "calibration_batches": len(batches or ()),
    }
    _report(target, ledger, modifiers, facts)
    return 0


def _check_modifiers(modifiers: Sequence["Modifier"]) -> None:
    """ValueError for modifiers that act while a model trains."""
    for modifier in modifiers:
        if modifier.start is not None or not (modifier.needs.calibration or modifier.handles_training_end):
            raise ValueError(
                f"{modifier.name} acts while a model trains, which this command does not do; use the recipe with a "
                f"Trainer: CompressionCallback, or +compress= in a Hydra app"
            )


def _batches(options: argparse.Namespace, modifiers: Sequence["Modifier"]) -> "list[dict[str, Tensor]] | None":
    """Calibration batches; None for recipes without data."""
    in_need = [modifier.name for modifier in modifiers if modifier.needs.data]
    if not in_need:
        if options.data != "none":
            print(f"the recipe {options.recipe} needs no data: {options.data} is not read")
        return None
    if options.data == "none":
        raise ValueError(f"{', '.join(in_need)} of {options.recipe} needs calibration data: give --data TEXT_FILE")
    from lightning_compress.cli.text_rows import text_batches, tokenizer_of

    tokenizer = tokenizer_of(options.folder)
    return text_batches(Path(options.data), tokenizer, options.batches, options.rows, options.tokens)


def _compress(
    options: argparse.Namespace, target: Path, modifiers: Sequence["Modifier"], batches: "list[Any] | None"
) -> "tuple[str, Ledger]":
    """Compress into ``target``; returns what was in memory at a time, and the ledger."""
    from lightning_compress.calibration.options import CalibrationOptions
    from lightning_compress.export import hugging_face
    from lightning_compress.folder import WholeModelNeeded, compress_folder
    from lightning_compress.report.progress import ProgressReport

    calibration = CalibrationOptions(device=options.device, seed=options.seed)
    dtype = _dtype(options.dtype)
    with ProgressReport(shown=True) as progress:

        def show(detail: str, done: int, total: int) -> None:
            progress("calibration", done, total, detail)

        try:
            return "one block", compress_folder(
                options.folder, target, modifiers, batches, options=calibration, dtype=dtype, memory=options.memory,
                overwrite=options.overwrite, resume=options.resume, progress=show,
            )  # fmt: skip
        except WholeModelNeeded as error:
            if options.memory is not None:
                raise ValueError(f"--memory {options.memory}: {error}") from error
            print(f"the whole model goes into memory: {error}")
            with hugging_face.no_progress_bar():
                return "whole model", _compress_in_memory(options, target, modifiers, batches, show)


def _compress_in_memory(
    options: argparse.Namespace, target: Path, modifiers: Sequence["Modifier"], batches: "list[Any] | None", show: Any
) -> "Ledger":
    from lightning_compress.export import hugging_face
    from lightning_compress.export.save import save
    from lightning_compress.oneshot import compress
    from lightning_compress.recipe import dump_recipe
    from lightning_compress.resume.folder_log import remove, unable

    recipe = dump_recipe(modifiers)
    model = hugging_face.dense_model(options.folder, _dtype(options.dtype))
    log = None if batches is None or unable(modifiers) else target.parent / f".{target.name}.log"
    ledger = compress(
        model, modifiers, batches, device=options.device, seed=options.seed, progress=show, log=log,
        resume=options.resume if log else "auto",
    )  # fmt: skip
    processors = hugging_face.processors(options.folder)
    save(model, target, tokenizer=processors, recipe=recipe, overwrite=options.overwrite)
    if log is not None:
        remove(log)
    return ledger


def _dtype(name: str | None) -> Any:
    import torch

    dtype = None if name is None else getattr(torch, name, None)
    if name is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"--dtype {name}: expected bfloat16, float16 or float32")
    return dtype


def _report(target: Path, ledger: "Ledger", modifiers: Sequence["Modifier"], facts: Mapping[str, Any]) -> None:
    from lightning_compress.layers.memory import peak_memory_bytes
    from lightning_compress.recipe import dump_recipe
    from lightning_compress.report import page, plots, summary, table

    facts = {
        **facts,
        "modifiers": dump_recipe(modifiers)["modifiers"],
        "model_bytes_after": sum(file.stat().st_size for file in target.glob("*.safetensors")),
        "peak_memory_bytes": peak_memory_bytes(),
        "export_dir": str(target),
    }
    folder = target.with_name(f"{target.name}-report")
    summary.write(folder, ledger, facts)
    page.write(folder, ledger, facts)
    plots.error_per_module(ledger, folder / "error_per_module.png", summary.headline(facts))
    table.show(ledger, facts)
    print(f"report: {folder / 'index.html'}")
