"""Every bench tells what it takes."""

import importlib
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
BENCHES = [file.stem for file in sorted(FOLDER.glob("bench_*.py")) if "def parse_arguments" in file.read_text()]


@pytest.mark.parametrize("name", BENCHES)
def test_help_is_printed(name, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    before = set(sys.modules)
    try:
        with pytest.raises(SystemExit) as ended:
            importlib.import_module(name).parse_arguments()
    finally:
        for module in set(sys.modules) - before:
            if (FOLDER / f"{module}.py").exists():
                del sys.modules[module]
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {name}")
