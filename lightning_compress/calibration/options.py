"""How a model is calibrated: the options that ``CompressionCallback`` and ``compress`` hand down to the walk."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from lightning_compress.layers.memory import bytes_of

__all__ = ["PRECISIONS", "WALKS", "CalibrationOptions", "CalibrationPrecision", "Walk", "check_device", "check_flag",
           "check_whole_number"]  # fmt: skip

Walk = Literal["auto", "one_pass", "two_pass", "whole"]
WALKS = get_args(Walk)
CalibrationPrecision = Literal["auto", "trained", "float32"]
PRECISIONS = get_args(CalibrationPrecision)


@dataclass(frozen=True)
class CalibrationOptions:
    """How calibration goes through a model.

    Args:
        blocks: Class names, dotted names or ``re:`` patterns of the model's repeated blocks; None: they are searched
            for.
        walk: ``two_pass``: every block runs twice per batch. ``one_pass``: in lockstep, once (for modifiers that can
            finish single modules). ``whole``: the model as one block, statistics of all targets at once. ``auto``: one
            pass where every modifier, the model and ``memory_limit`` allow it, else two.
        device: Device that each block is moved to for its turn; None: the model stays where it is.
        offload_device: Device on which the inputs of blocks are stored; None: the one on which they are computed.
        seed: Seed of torch's random state while calibrating, and of the choice of calibration samples.
        moe_calibrate_all_experts: Statistics of experts that share one tensor use all tokens, not only those that the
            router sends to them; the outputs of the model stay the same.
        memory_limit: Bytes that ``walk="auto"`` may use on the device beside the model, as a number or such as
            ``"300MB"``; None: 0.6 of the memory that the model leaves.
        calibration_precision: How a model that was trained in mixed precision runs while it is calibrated. ``trained``:
            under the same autocast, so that layers see the inputs that they were trained on. ``float32``: without.
            ``auto``: as trained on a GPU, in float32 on a CPU.
        cache_activations: Where the inputs of blocks are stored between blocks. ``memory``: on ``offload_device``.
            ``disk``: in a file in the folder of temporary files; with a Trainer in its ``default_root_dir``, with
            ``compress_folder`` beside the target. Anything else is the path of a folder for that file.

    Raises:
        ValueError: A value has the wrong type, or is not one of the values above.
    """

    blocks: str | Sequence[str] | None = None
    walk: Walk = "auto"
    device: str | torch.device | None = None
    offload_device: str | torch.device | None = "cpu"
    seed: int = 0
    moe_calibrate_all_experts: bool = False
    memory_limit: int | str | None = None
    calibration_precision: CalibrationPrecision = "auto"
    cache_activations: str = "memory"

    def __post_init__(self) -> None:
        """Check types, too: Hydra and YAML pass on whatever the user wrote."""
        check_whole_number("seed", self.seed)
        check_flag("moe_calibrate_all_experts", self.moe_calibrate_all_experts)
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed}: expected at least 0, and less than 2**63")
        if self.memory_limit is not None:
            bytes_of(self.memory_limit)
        for name, values in (("walk", WALKS), ("calibration_precision", PRECISIONS)):
            if getattr(self, name) not in values:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected {', '.join(map(repr, values))}")
        if self.walk == "whole" and self.blocks is not None:
            raise ValueError(
                f"walk='whole' takes the model as one block, so blocks={self.blocks!r} has no effect; leave one out"
            )
        if not isinstance(self.cache_activations, str) or not self.cache_activations:
            raise ValueError(
                f"cache_activations={self.cache_activations!r}: expected 'memory', 'disk' or the path of a folder"
            )
        for name in ("device", "offload_device"):
            if getattr(self, name) is not None and not _is_device(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)!r}: expected a device such as 'cpu' or 'cuda'")

    @property
    def cache_folder(self) -> Path | None:
        """Folder of the file with the inputs of blocks; None: they are in memory."""
        if self.cache_activations == "memory":
            return None
        on_disk = self.cache_activations == "disk"
        return Path(tempfile.gettempdir() if on_disk else self.cache_activations).expanduser()

    def cached_in(self, folder: str | Path) -> "CalibrationOptions":
        """With ``cache_activations="disk"`` the file is in this folder."""
        return replace(self, cache_activations=str(folder)) if self.cache_activations == "disk" else self


def check_whole_number(name: str, value: Any) -> None:
    """ValueError for anything but an int; True and False are not numbers here."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name}={value!r} is a {type(value).__name__}, expected a whole number")


def check_flag(name: str, value: Any) -> None:
    """ValueError for anything but True and False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} is a {type(value).__name__}, expected True or False")


def check_device(options: CalibrationOptions) -> None:
    """ValueError where this machine cannot store tensors on ``offload_device``."""
    try:
        torch.empty(1, dtype=torch.float32, device=options.offload_device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"offload_device={options.offload_device!r} is not on this machine: {error}") from error


def _is_device(name: Any) -> bool:
    try:
        return torch.device(name).type != "meta"  # it stores no values
    except (RuntimeError, TypeError):
        return False
