"""Whether an exported folder gives the outputs of the model that was saved: plain transformers reads it.

It does so in a new process, without this package and without the state of this process, on the CPU, with the inputs of
one call of the model in memory.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_compress.export import hugging_face
from lightning_compress.export.experts import installed
from lightning_compress.layers.forward import eval_mode
from lightning_compress.modifiers.rotation.online import OnlineRotations

__all__ = ["answers", "is_wanted", "largest", "recorded_call"]

TOLERANCE = 0.02  # of the logits' norm; bfloat16 on two devices differs by less, random experts by about 1
SECONDS = 600
AUTO_BYTES = 2 * 10**9
READER = """
import json, sys, torch, transformers
from safetensors.torch import load_file, save_file
folder, work = sys.argv[1:]
call = json.load(open(f"{work}/call.json"))
model = getattr(transformers, call["class"]).from_pretrained(folder)
with torch.no_grad():
    out = model.eval()(**load_file(f"{work}/inputs"), **call["settings"])
save_file({"out": out[call["key"]].float().contiguous()}, f"{work}/out")
"""


def is_wanted(model: nn.Module, folder: Path, wish: bool | str) -> bool:
    """Whether to verify: as ``wish`` says; ``auto``: where transformers has the class and the folder is below 2 GB."""
    import transformers

    readable = hugging_face.is_transformers(model) and hasattr(transformers, type(model).__name__)
    if wish == "auto":
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        return readable and not OnlineRotations.find(model) and size <= AUTO_BYTES
    return bool(wish)


def answers(
    model: nn.Module, folder: Path, run: Callable[[], Any] | None = None, call: Mapping[str, Any] | None = None
) -> tuple[float | None, str]:
    """The distance of the outputs of the folder from those of the model, and the fault; empty where there is none.

    Args:
        model: The model that was saved.
        folder: The export.
        run: Calls the model once on a batch; None: with the dummy inputs of transformers.
        call: What :func:`recorded_call` returned before, where the model cannot be called now.
    """
    if not hugging_face.is_transformers(model):
        return None, (
            f"{folder} is not verified: a {type(model).__name__} is not a model of transformers, and no other process "
            f"can build it; compare lightning_compress.load(folder, a freshly built one) with it on a batch"
        )
    try:
        call = recorded_call(model, run) if call is None else call
        gap = _difference(model, folder, call)
    except Exception as error:
        reason = f"{error}; lightning_compress.load reads it even where other loaders cannot"
        return None, f"{folder} is not verified: {reason}"
    if gap <= TOLERANCE:
        return gap, ""
    garbage = ", like those of a model with random weights" if gap > 0.5 else ""
    return gap, (
        f"{installed()} loads {folder} without an error and gives other outputs: its logits differ by "
        f"{100 * gap:.3g} % of their norm{garbage}; lightning_compress.load gives the outputs of this model"
    )


def recorded_call(model: nn.Module, run: Callable[[], Any] | None = None) -> dict[str, Any]:
    """The keyword arguments with which ``run`` calls the model, in evaluation mode, and its output as ``output``."""
    calls: list[dict[str, Any] | None] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        names = [str(model.main_input_name)] if len(args) == 1 and hasattr(model, "main_input_name") else []
        simple = all(isinstance(v, Tensor | bool | int | float | str | None) for v in (*args, *kwargs.values()))
        named = dict(zip(names, args, strict=False)) | kwargs
        calls.append(named | {"output": output} if simple and len(names) == len(args) else None)

    handle = model.register_forward_hook(record, with_kwargs=True)
    try:
        with torch.no_grad(), eval_mode(model):
            model(**hugging_face.example_of(model)) if run is None else run()
    finally:
        handle.remove()
    if not calls or calls[0] is None:
        raise ValueError("the model was not called with tensors and numbers by name, which another process could take")
    return calls[0]


def _difference(model: nn.Module, folder: Path, call: Mapping[str, Any]) -> float:
    """The norm of the difference between the logits of the folder and of the model, relative to that of the logits.

    Raises:
        ValueError: The folder does not load, or not with these inputs; holds the message of the loader.
    """
    expected, key = largest(call["output"])
    tensors = {name: value.cpu().contiguous() for name, value in call.items() if isinstance(value, Tensor)}
    settings = {name: value for name, value in call.items() if name != "output" and name not in tensors}
    with tempfile.TemporaryDirectory() as work:
        save_file(tensors, f"{work}/inputs")
        request = {"class": type(model).__name__, "key": key, "settings": settings}
        Path(work, "call.json").write_text(json.dumps(request), encoding="utf-8")
        process = subprocess.run(
            [sys.executable, "-c", READER, str(folder), work],
            env=_environment(),
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        if process.returncode:
            reason = next((line for line in reversed(process.stderr.splitlines()) if line.strip()), "no message")
            raise ValueError(f"{installed()} does not load {folder}, or does not run it: {reason}")
        actual = load_file(f"{work}/out")["out"]
    if actual.shape != expected.shape:
        raise ValueError(f"{folder} gives outputs {tuple(actual.shape)}, the model in memory {tuple(expected.shape)}")
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))


def largest(output: Any) -> tuple[Tensor, str]:
    """The largest tensor of floats among the outputs, such as the logits, and its name."""
    if not isinstance(output, Mapping):
        raise ValueError(f"the model returns a {type(output).__name__}, expected outputs of transformers, by name")
    tensors = {k: v for k, v in output.items() if isinstance(v, Tensor) and v.is_floating_point()}
    if not tensors:
        raise ValueError(f"the model returns {sorted(output)}, and no tensor of floats among them")
    key = max(tensors, key=lambda name: (name.startswith("logits"), tensors[name].numel()))
    return tensors[key].detach().float().cpu(), key


def _environment() -> dict[str, str]:
    """The environment without GPUs, without the network, and without variables that make a process a rank."""
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
    others = {key: value for key, value in os.environ.items() if key not in ranks and not key.startswith("SLURM_")}
    return others | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
