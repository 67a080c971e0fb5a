"""``lightning-compress export FOLDER --format gguf --out FOLDER``: an exported folder in another format."""

import argparse
from pathlib import Path

__all__ = ["DESCRIPTION", "SUMMARY", "act", "add_arguments"]

SUMMARY = "an exported folder in another format"
DESCRIPTION = """Write the model of an exported folder, or a dense model, in another format:

    gguf                 model.gguf for llama.cpp: Llama, Qwen2 and Qwen3; codes are re-encoded, not rounded again
    onnx                 model.onnx, checked in ONNX Runtime on the dummy inputs of transformers
    compressed_tensors   what transformers and vLLM load, written again

Exit code: 0; 2 if the format cannot hold the model.

    lightning-compress export ./SmolLM2-Q4 --format gguf --out ./SmolLM2-gguf"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the subcommand."""
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    parser.add_argument(
        "--format", choices=("gguf", "onnx", "compressed_tensors"), required=True, help="format to write"
    )
    parser.add_argument("--out", metavar="FOLDER", type=Path, required=True, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export of that name")


def act(options: argparse.Namespace) -> int:
    """Load and write the model; returns the exit code."""
    import yaml

    from lightning_compress.export import hugging_face
    from lightning_compress.export.load import load
    from lightning_compress.export.save import save
    from lightning_compress.export.tensors import read_json
    from lightning_compress.files.atomic_folder import check_target

    source = options.folder.expanduser().resolve()
    if options.out.is_dir() and any(options.out.iterdir()) and not options.overwrite:
        raise ValueError(f"{options.out} exists and is not empty; choose another, or replace an export by --overwrite")
    target = check_target(options.out, overwrite=options.overwrite)
    if "model_type" not in read_json(source / "config.json"):
        raise ValueError(
            f"{source} holds a model that transformers does not have: build it, then call lightning_compress.load and "
            f"save"
        )
    path = source / "recipe.yaml"
    recipe = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    with hugging_face.no_progress_bar():
        model, processors = load(source, packed=False, fuse=False), hugging_face.processors(source)
        save(
            model, target, format=options.format, tokenizer=processors, recipe=recipe, overwrite=options.overwrite
        )  # fmt: skip
    size = sum(file.stat().st_size for file in target.iterdir())
    print(f"{target}: {size / 2**20:.4g} MiB")
    return 0
