"""What the loggers of the Trainer get at the end of a run, by the type of the logger.

    any logger      numbers named compress/...
    W&B             and the recipe as config, the table of modules, the page, the files of the report as an artifact
    MLflow          and the recipe as parameters, the files of the report as artifacts
    TensorBoard     and, in the run ``compress`` below its own, recipe and table as text, and the recipe as hparams
    CSV             and the recipe in hparams.yaml

Weights leave the machine only where the user asked the logger for that: ``WandbLogger(log_model=True)`` and
``MLFlowLogger(log_model=True)`` (or ``"all"``) get the exported folder. Only files that this run wrote are logged. The
packages of loggers are imported only where such a logger exists. A part that fails is a warning, and costs no other.
"""

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from lightning_compress.core.ledger import Ledger, Row
from lightning_compress.export.save import dump_yaml
from lightning_compress.report import summary
from lightning_compress.training.failures import as_warning
from lightning_compress.training.gate import gate_failures

__all__ = ["Outcome", "file_versions", "log", "written_since"]

TEXT_ROWS = 500  # of modules in a text of TensorBoard, whose browser gets all of it at once
KEY_COLUMNS = ("model_bytes_after", "bits_per_weight", "sparsity")  # of the table of hparams, beside the metrics


@dataclass(frozen=True)
class Outcome:
    """A finished run.

    Args:
        ledger: What was done to each module.
        facts: Those of the report; see report/summary.py.
        report_files: Files of the report that this run wrote.
        step: The Trainer's step.
    """

    ledger: Ledger
    facts: Mapping[str, Any]
    report_files: Sequence[Path]
    step: int

    @property
    def export(self) -> Path | None:
        """The exported folder."""
        return Path(self.facts["export_dir"]) if "export_dir" in self.facts else None

    @cached_property
    def scalars(self) -> dict[str, float]:
        """Finite numbers."""
        facts = self.facts
        sums = summary.totals(self.ledger) | {n: v for n, v in facts.items() if n.startswith("model_bytes")}
        numbers = {name: value for name, value in sums.items() if isinstance(value, int | float)}
        numbers |= {f"seconds/{phase.replace(' ', '_')}": spent for phase, spent in facts["seconds"].items()}
        for name, entry in facts["metric"].items():
            numbers |= {f"{name}_before": entry["before"], f"{name}_after": entry["after"]}
        if "gate" in facts:
            numbers["gate_held"] = float(not gate_failures(facts))
        return {f"compress/{name}": value for name, value in numbers.items() if math.isfinite(value)}

    @property
    def key_scalars(self) -> dict[str, float]:
        """Those by which runs are compared."""
        names = {*KEY_COLUMNS, *(f"{name}_after" for name in self.facts["metric"])}
        return {name: value for name, value in self.scalars.items() if name.removeprefix("compress/") in names}

    @property
    def config(self) -> dict[str, Any]:
        """Name of the recipe, and all arguments of its modifiers, by names such as ``compress/gptq/scheme``."""
        recipe = self.facts["recipe"]
        named = {"compress/recipe": recipe} if isinstance(recipe, str) else {}
        return {**named, **_flat("compress", self.facts["modifiers"])}

    @property
    def paths(self) -> dict[str, str]:
        """Where the files are, for loggers that hold no files."""
        report = {"compress/report": str(self.report_files[0].parent)} if self.report_files else {}
        return report | ({"compress/export_dir": str(self.export)} if self.export else {})

    def table(self) -> tuple[list[str], list[list[Any]]]:
        """Columns and rows of the table of modules."""
        rows = [{**asdict(row), "flags": "; ".join(row.flags)} for row in self.ledger]
        columns = [f.name for f in fields(Row) if any(row[f.name] not in (None, "") for row in rows)]
        return columns, [[row[name] for name in columns] for row in rows]


def log(loggers: Sequence[Logger], outcome: Outcome) -> None:
    """Log a run; on rank zero, after its files are written."""
    for logger in loggers:
        with _attempt(logger, "the log"):
            logger.log_metrics(outcome.scalars, step=outcome.step)
        if isinstance(logger, WandbLogger):
            _to_wandb(logger, outcome)
        elif isinstance(logger, MLFlowLogger):
            _to_mlflow(logger, outcome)
        elif isinstance(logger, TensorBoardLogger):
            _to_tensorboard(logger, outcome)
        elif isinstance(logger, CSVLogger):
            with _attempt(logger, "the recipe"):
                logger.log_hyperparams({**outcome.config, **outcome.paths})
        with _attempt(logger, "the log"):
            logger.save()


def file_versions(folder: Path) -> dict[Path, tuple[int, int]]:
    """What tells the files of a folder from later ones of the same names; empty where it does not exist."""
    files = [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    return {path: (status.st_ino, status.st_mtime_ns) for path in files for status in [path.stat()]}


def written_since(folder: Path, versions: Mapping[Path, tuple[int, int]]) -> list[Path]:
    """Files of a folder that were written after :func:`file_versions` gave ``versions``, in alphabetical order."""
    return sorted(path for path, version in file_versions(folder).items() if versions.get(path) != version)


def _to_wandb(logger: WandbLogger, outcome: Outcome) -> None:
    import wandb

    experiment = logger.experiment
    with _attempt(logger, "the recipe"):
        logger.log_hyperparams(outcome.config)
    with _attempt(logger, "the table of modules"):
        columns, rows = outcome.table()
        if rows:
            logger.log_table("compress/modules", columns=columns, data=rows, step=outcome.step)
    with _attempt(logger, "the page"):
        for file in outcome.report_files:
            if file.suffix == ".html":
                page = wandb.Html(file.read_text(encoding="utf-8"), inject=False, data_is_not_path=True)
                logger.log_metrics({f"compress/{file.stem}": page}, step=outcome.step)
    with _attempt(logger, "the report"):
        if outcome.report_files:
            report = wandb.Artifact(f"compression-report-{experiment.id}", type="report")
            for file in outcome.report_files:
                report.add_file(str(file))
            experiment.log_artifact(report)
    with _attempt(logger, "the exported folder"):
        if outcome.export and _wants_weights(logger):
            model = wandb.Artifact(f"compressed-{experiment.id}", type="model", metadata=outcome.key_scalars)
            model.add_dir(str(outcome.export), policy=logger.add_file_policy)
            experiment.log_artifact(model)


def _to_mlflow(logger: MLFlowLogger, outcome: Outcome) -> None:
    client, run = logger.experiment, logger.run_id
    with _attempt(logger, "the recipe"):
        logger.log_hyperparams({re.sub(r"[^\w\-./ ]", "_", name): value for name, value in outcome.config.items()})
    with _attempt(logger, "the report"):
        for file in outcome.report_files:
            client.log_artifact(run, str(file), "compress")
    with _attempt(logger, "the exported folder"):
        if outcome.export and _wants_weights(logger):
            client.log_artifacts(run, str(outcome.export), "compressed")


def _to_tensorboard(logger: TensorBoardLogger, outcome: Outcome) -> None:
    """In a run of its own: TensorBoard shows only the first hparams of a run, which are those of the module."""
    with _attempt(logger, "the recipe"):
        below = TensorBoardLogger(
            logger.save_dir,
            name=logger.name,
            version=logger.version,
            sub_dir=str(Path(logger.sub_dir or "") / "compress"),
            default_hp_metric=False,
        )
        below.log_hyperparams(outcome.config, outcome.key_scalars, step=outcome.step)
        lines = [f"- {name.removeprefix('compress/')}: `{path}`" for name, path in outcome.paths.items()]
        recipe = dump_yaml({"modifiers": outcome.facts["modifiers"]})
        below.experiment.add_text("compress/recipe", f"```yaml\n{recipe}```", outcome.step)
        below.experiment.add_text("compress/files", "\n".join(lines), outcome.step)
        below.experiment.add_text("compress/modules", _markdown(*outcome.table()), outcome.step)
        below.finalize("success")


def _attempt(logger: Logger, part: str) -> AbstractContextManager[None]:
    return as_warning(f"{part} in {type(logger).__name__}")


def _wants_weights(logger: WandbLogger | MLFlowLogger) -> bool:
    """Whether the logger was told to upload checkpoints; it has no public name for its argument ``log_model``."""
    return bool(logger._log_model)


def _flat(name: str, value: Any) -> dict[str, Any]:
    """Leaves of nested mappings by names with slashes; lists stay."""
    if not isinstance(value, Mapping) or not value:
        return {name: value}
    return {n: leaf for key, inner in value.items() for n, leaf in _flat(f"{name}/{key}", inner).items()}


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def line(cells: Sequence[Any]) -> str:
        texts = ["" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells]
        return f"| {' | '.join(text.replace('|', '/') for text in texts)} |"

    if not rows:
        return "no module was compressed"
    lines = [line(columns), line(["---"] * len(columns)), *map(line, rows[:TEXT_ROWS])]
    if len(rows) > TEXT_ROWS:
        lines += ["", f"The first {TEXT_ROWS} of {len(rows)} rows; modules.csv in the report has all."]
    return "\n".join(lines)
