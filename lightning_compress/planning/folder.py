"""The plan for a model on disk, whose weights are not read."""

from pathlib import Path
from typing import Any

import torch

from lightning_compress.export import hugging_face
from lightning_compress.export.tensor_file import TensorFolder
from lightning_compress.export.tensors import read_json
from lightning_compress.planning.make import make_plan
from lightning_compress.planning.plan import Plan
from lightning_compress.recipe import read_recipe

__all__ = ["plan_folder"]


def plan_folder(
    folder: str | Path,
    recipe: str,
    batches: int = 16,
    rows: int = 2,
    tokens: int = 512,
    dtype: torch.dtype | None = None,
) -> Plan:
    """Plan a recipe for the folder of a dense model of transformers.

    Trials run on its first blocks with random weights, and random tokens, or the model's ``dummy_inputs`` where it does
    not take token ids.

    Args:
        folder: As ``save_pretrained`` writes it.
        recipe: Name or path of a recipe; settings in it that are for the callback do not change the plan.
        batches: Calibration batches.
        rows: Rows of a batch.
        tokens: Tokens of a row.
        dtype: That of the model; by default the one of its config.

    Raises:
        ValueError: The folder is not such a model, there is no such recipe, or a number is below 1.
    """
    for name, value in (("batches", batches), ("rows", rows), ("tokens", tokens)):
        if value < 1:
            raise ValueError(f"{name}={value}, expected at least 1")
    folder = Path(folder).expanduser().resolve()
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json, expected the folder of a model of transformers")
    modifiers = read_recipe(recipe).modifiers
    files = TensorFolder(folder)
    named = read_json(folder / "config.json")
    stored = next(kind for name, file in files.files.items() if (kind := file.dtype(name)).is_floating_point)
    usual: Any = getattr(torch, str(named.get("dtype") or named.get("torch_dtype")), stored)
    model = hugging_face.on_meta(folder, len(files.files), dtype or usual)
    batch = hugging_face.dummy_inputs(model)
    if "input_ids" in batch:
        size = model.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(0)
        batch = {"input_ids": torch.randint(size, (rows, tokens), generator=generator, dtype=torch.int64, device="cpu")}
    return make_plan(model, modifiers, batch, batches, processors=hugging_face.processors(folder))
