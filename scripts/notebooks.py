"""The tutorials as notebooks:  python -m scripts.notebooks [NAME ...]     (`make notebooks`)

A tutorial is docs/tutorials/NAME.py: cells that begin with ``# %%`` (code) or ``# %% [markdown]`` (text in comments).
This runs each in one process, in a temporary folder, and writes NAME.ipynb beside it with what every cell printed. The
site shows the notebooks, and tests run the cells: neither needs Jupyter.
"""

import argparse
import contextlib
import io
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "docs" / "tutorials"


@dataclass(frozen=True)
class Cell:
    """A cell of a tutorial: ``kind`` is code or markdown."""

    kind: str
    text: str


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.py"))


def cells(name: str) -> list[Cell]:
    """The cells of docs/tutorials/NAME.py."""
    parts = re.split(r"^# %%(.*)\n", (FOLDER / f"{name}.py").read_text(encoding="utf-8"), flags=re.MULTILINE)
    if parts[0].strip():
        raise ValueError(f"{name}.py: expected '# %% [markdown]' in the first line, got {parts[0].splitlines()[0]!r}")
    result = []
    for header, body in zip(parts[1::2], parts[2::2], strict=True):
        if "[markdown]" in header:
            result.append(Cell("markdown", re.sub(r"^# ?", "", body, flags=re.MULTILINE).strip()))
        else:
            result.append(Cell("code", body.strip()))
    return result


def run(name: str) -> Iterator[tuple[Cell, str]]:
    """Run the cells in order, in the current folder; each with what it printed."""
    variables: dict[str, Any] = {"__name__": name}
    for number, cell in enumerate(cells(name)):
        printed = io.StringIO()
        if cell.kind == "code":
            with contextlib.redirect_stdout(printed):
                exec(compile(cell.text, f"{name}.py, cell {number}", "exec"), variables)
        yield cell, printed.getvalue()


def notebook(outputs: Sequence[tuple[Cell, str]]) -> dict[str, Any]:
    """A notebook of version 4.5."""
    written = []
    for number, (cell, printed) in enumerate(outputs):
        entry: dict[str, Any] = {"cell_type": cell.kind, "id": f"cell-{number}", "metadata": {}}
        entry["source"] = cell.text.splitlines(keepends=True)
        if cell.kind == "code":
            text = printed.splitlines(keepends=True)
            stream = [{"output_type": "stream", "name": "stdout", "text": text}] if text else []
            entry |= {"execution_count": None, "outputs": stream}
        written.append(entry)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": written, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def page(path: Path) -> str:
    """A notebook as Markdown, for the site."""
    blocks = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        blocks.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", []):
            blocks.append("```text\n" + "".join(output["text"]).rstrip() + "\n```")
    return "\n\n".join(blocks) + f"\n\n[This page as a notebook]({path.name})\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    chosen = parser.parse_args(arguments).names or names()
    for name in chosen:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            outputs = [(cell, printed.replace(os.getcwd(), ".")) for cell, printed in run(name)]
        text = json.dumps(notebook(outputs), indent=1, ensure_ascii=False) + "\n"
        (FOLDER / f"{name}.ipynb").write_text(text, encoding="utf-8")
        print(f"written: {FOLDER / name}.ipynb")


if __name__ == "__main__":
    main()
