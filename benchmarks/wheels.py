"""Packages from a folder of wheels, for a machine that reaches no registry: BENCH_WHEELS=folder.

The wheels are unpacked into a temporary folder that stands last on the path: what is installed comes first. Nothing is
installed, nothing is resolved; `make bench-wheels` fetches a set for the machine that it runs on.
"""

import atexit
import importlib.util
import os
import shutil
import sys
import tempfile
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["folder", "missing", "unpacked", "versions"]

SHOWN = (
    "triton", "gemlite", "humming-kernels", "llmcompressor", "compressed-tensors", "transformers", "pydantic", "numpy",
)  # fmt: skip


def folder() -> Path | None:
    """Where BENCH_WHEELS points to; None when it is not set."""
    named = os.environ.get("BENCH_WHEELS", "")
    return Path(named) if named else None


def unpacked() -> list[str]:
    """Names of the wheels, which can be imported now.

    Raises:
        SystemExit: The folder is not there.
    """
    source = folder()
    if source is None:
        return []
    if not source.is_dir():
        raise SystemExit(
            f"BENCH_WHEELS={source} is not a folder; fetch the wheels with `make bench-wheels`, or unset it"
        )
    target = tempfile.mkdtemp(prefix="bench-wheels-")
    atexit.register(shutil.rmtree, target, ignore_errors=True)
    found = sorted(source.glob("*.whl"))
    for wheel in found:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.infolist():
                path = archive.extract(member, target)
                if mode := member.external_attr >> 16 & 0o777:  # humming-kernels brings a program that it runs
                    os.chmod(path, mode)
    sys.path.append(target)
    importlib.invalidate_caches()
    return [wheel.name for wheel in found]


def missing(*modules: str) -> list[str]:
    """Those that cannot be found."""
    return [module for module in modules if importlib.util.find_spec(module) is None]


def versions() -> dict[str, str]:
    """Of the packages that take part, as far as they are there."""
    found: dict[str, str] = {}
    for package in SHOWN:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
