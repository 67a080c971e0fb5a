"""Read a JSON file that is not trusted: its size is bounded before it is parsed."""

import json
from pathlib import Path
from typing import Any

__all__ = ["read_bounded_json"]


def read_bounded_json(path: Path, largest: int) -> Any:
    """The value in a file of at most ``largest`` bytes; OSError or ValueError where there is none."""
    if (size := path.stat().st_size) > largest:
        raise ValueError(f"{path} has {size} bytes, expected at most {largest}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply") from error
