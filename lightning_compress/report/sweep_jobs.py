"""The jobs of a sweep, read from its folder: the overrides of each, its summary.json, or why there is none.

Hydra writes ``multirun.yaml`` (the command line of the sweep) into the folder of a sweep, and ``.hydra/`` into the
folder of each job. A job without a folder is known from the command line, expanded as Hydra's basic sweeper expands it.
A folder of single runs, such as those of a Slurm array, is read the same way.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import yaml

__all__ = ["Job", "differing_keys", "read_jobs"]


@dataclass(frozen=True)
class Job:
    """One run.

    Args:
        name: Its folder, below that of the sweep.
        overrides: Its command line, {key: value}; keys without ``+``.
        summary: Content of its summary.json; empty where ``fault`` says why.
        fault: Why there is no summary, in words.
        modes: {metric: "min" or "max"}, as the callbacks of its config monitor them.
    """

    name: str
    overrides: Mapping[str, str] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    fault: str = ""
    modes: Mapping[str, str] = field(default_factory=dict)


def read_jobs(folder: str | Path) -> list[Job]:
    """Every job below a folder, and those that sweeps below it should have and have not, ordered by name.

    Raises:
        ValueError: There is no such folder, or no job in it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"{folder} is not a folder; expected the folder of a sweep, such as hydra.sweep.dir")
    folders = {path.parent.parent for path in root.rglob(".hydra/overrides.yaml")}
    folders |= {path.parent.parent for path in root.rglob("report/summary.json")}
    jobs = {path: _job(path, root) for path in folders}
    missing = [job for path in root.rglob("multirun.yaml") for job in _missing(path, folders, root)]
    if not jobs and not missing:
        raise ValueError(f"no run in {folder}: expected folders that hold .hydra/overrides.yaml or report/summary.json")
    return sorted([*jobs.values(), *missing], key=lambda job: _natural(job.name))


def differing_keys(jobs: Iterable[Job]) -> list[str]:
    """Keys of overrides whose values differ between the jobs, in the order of the command lines."""
    commands = [job.overrides for job in jobs]
    keys = dict.fromkeys(key for command in commands for key in command)
    return [key for key in keys if len({command.get(key) for command in commands}) > 1]


def _job(folder: Path, root: Path) -> Job:
    name = folder.relative_to(root).as_posix()
    try:
        overrides = _by_key(_read_yaml(folder / ".hydra" / "overrides.yaml") or [])
        modes = _modes(_read_yaml(folder / ".hydra" / "config.yaml"))
    except ValueError as error:
        return Job(name, fault=str(error))
    path = folder / "report" / "summary.json"
    if not path.exists():
        return Job(name, overrides, fault=f"it has no report/summary.json; {_end_of_log(folder)}", modes=modes)
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(summary, dict):
            raise ValueError(f"expected an object, got a {type(summary).__name__}")
    except (OSError, ValueError) as error:
        return Job(name, overrides, fault=f"its report/summary.json cannot be read: {error}", modes=modes)
    return Job(name, overrides, summary, modes=modes)


def _missing(multirun: Path, folders: Iterable[Path], root: Path) -> list[Job]:
    """Jobs of the sweep with this multirun.yaml that have no folder."""
    place = multirun.parent
    numbers = {_number(folder) for folder in folders if folder.is_relative_to(place)}
    try:
        commands = _commands(_read_yaml(multirun))
    except ValueError as error:
        return [Job((place.relative_to(root) / "multirun.yaml").as_posix(), fault=str(error))]
    fault = "it has no folder: it did not start, or the folder was removed"
    return [
        Job((place.relative_to(root) / str(number)).as_posix(), _by_key(command), fault=fault)
        for number, command in enumerate(commands)
        if number not in numbers
    ]


def _commands(multirun: Any) -> Sequence[Sequence[str]]:
    """Overrides of every job, from the content of multirun.yaml; empty where the sweeper decides while it runs."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    hydra = multirun.get("hydra", {}) if isinstance(multirun, dict) else {}
    sweeper = hydra.get("sweeper", {})
    if not str(sweeper.get("_target_")).endswith(".BasicSweeper"):
        trials = sweeper.get("n_trials")
        return [[]] * trials if isinstance(trials, int) else []
    arguments = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
    arguments += hydra.get("overrides", {}).get("task", [])
    choices: dict[str, list[str]] = {}
    try:
        for override in OverridesParser.create().parse_overrides(arguments):
            key = override.get_key_element()
            values = override.sweep_string_iterator() if override.is_sweep_override() else [_value(override)]
            choices[key] = [f"{key}={value}" for value in values]
    except HydraException as error:
        raise ValueError(f"jobs that did not start are not listed, since their number is unknown: {error}") from error
    return list(product(*choices.values()))


def _value(override: Any) -> str:
    return str(override.get_value_element_as_str())


def _number(folder: Path) -> int | None:
    """Hydra's number of a job."""
    try:
        content = _read_yaml(folder / ".hydra" / "hydra.yaml") or {}
        number = content["hydra"]["job"]["num"]
    except (ValueError, KeyError, TypeError):
        number = int(folder.name) if folder.name.isdigit() else None
    return number if isinstance(number, int) else None


def _by_key(overrides: Iterable[str]) -> dict[str, str]:
    pairs = (str(override).partition("=") for override in overrides)
    return {key.lstrip("+"): value for key, _, value in pairs}


def _modes(config: Any) -> dict[str, str]:
    """What ModelCheckpoint, EarlyStopping and their like monitor."""
    callbacks = config.get("callbacks") if isinstance(config, dict) else None
    entries = [entry for entry in (callbacks or {}).values() if isinstance(entry, dict) and entry.get("monitor")]
    return {str(entry["monitor"]): str(entry.get("mode", "min")) for entry in entries}


def _read_yaml(path: Path) -> Any:
    """None where there is no such file."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _end_of_log(folder: Path) -> str:
    """The last line and the last error: submitit logs "successful completion" after an error that Hydra has caught."""
    logs = sorted(folder.glob("*.log"), key=lambda path: path.stat().st_mtime)
    text = logs[-1].read_text(encoding="utf-8", errors="replace").strip() if logs else ""
    if not text:
        return "it has no log"
    last = text.splitlines()[-1].strip()
    errors = re.findall(r"^Traceback \(most recent call last\):\n(?:[ \t].*\n)*(\S.*)$", text, re.MULTILINE)
    error = f" (its last error: {errors[-1]})" if errors and errors[-1] != last else ""
    return f"{logs[-1].name} ends: {last}{error}"


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts 2 before 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
