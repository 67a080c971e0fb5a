"""Folders of sweeps as Hydra and the report write them, without a run."""

import json
from pathlib import Path
from typing import Any

import yaml

BASIC = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"


def write_multirun(folder: Path, task: list[str], **sweeper: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"hydra": {"sweeper": {"_target_": BASIC, "params": None, **sweeper}, "overrides": {"task": task}}}
    (folder / "multirun.yaml").write_text(yaml.safe_dump(content))


def write_job(folder: Path, overrides: list[str], summary: dict[str, Any] | None = None, **files: Any) -> Path:
    """``files``: content of .hydra/NAME.yaml."""
    for name, content in {"overrides": overrides, **files}.items():
        path = folder / ".hydra" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(content))
    if summary is not None:
        path = folder / "report" / "summary.json"
        path.parent.mkdir()
        path.write_text(json.dumps(summary))
    return folder


def summary_of(size: int, after: float | str, error: float | None = 0.25, metric: str = "perplexity") -> dict[str, Any]:
    """A model of 4 MiB with a metric of 5 that was compressed to ``size`` bytes."""
    change = after - 5.0 if isinstance(after, float) else after
    return {
        "model_bytes_before": 4 * 1024**2,
        "model_bytes_after": size,
        "bits_per_weight": 4.25,
        "metric": {metric: {"before": 5.0, "after": after, "difference": change, "standard_error": error}},
        "seconds": {"calibration": 1.5, "export": 0.25},
        "export_dir": "compressed",
    }
