"""The Python in the documentation runs, and what it names exists."""

import doctest
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from lightning_compress import modifiers
from lightning_compress.recipe import load_recipe

ROOT = Path(__file__).parents[1]
DOCTESTED = [path for path in sorted((ROOT / "lightning_compress").rglob("*.py")) if ">>> " in path.read_text()]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md"])


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", ["docs/writing.md", "docs/export.md"])
def test_the_examples_run_from_top_to_bottom(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lightning_compress.core.factory.ModifierFactory._registered", {})
    code = "\n".join(blocks(ROOT / name, "python"))
    assert code
    exec(compile(code, name, "exec"), {"__name__": "example"})


@pytest.mark.parametrize("path", DOCTESTED, ids=lambda p: p.stem)
def test_the_examples_in_docstrings_run(path, monkeypatch):
    monkeypatch.setattr("lightning_compress.core.factory.ModifierFactory._registered", {})
    module = import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    outcome = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert outcome.attempted
    assert not outcome.failed


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_parses_and_recipes_build(page, tmp_path):
    for code in blocks(page, "python"):
        compile(code, page.name, "exec")
    for text in blocks(page, "yaml"):
        content = yaml.safe_load(text)
        if "compress" in content:
            (tmp_path / "mine.yaml").write_text(text)
            assert load_recipe(tmp_path / "mine.yaml")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_paths_lead_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
    folders = ("lightning_compress", "hydra_plugins", "examples", "benchmarks", "tests")
    files = ["/train.py", *(path.as_posix() for folder in folders for path in (ROOT / folder).rglob("*.py"))]
    for path in re.findall(r"[\w/]+\.py\b", re.sub(r"\]\([^)]*\)", "]", text)):
        assert any(file.endswith(f"/{path}") for file in files), f"{page.name} names {path}"


def names_in_tables(heading: str) -> list[str]:
    """Names in the first column of docs/modifiers.md's tables "while training" and "after training" of that heading."""
    start = rf"^\| (?:while|after) training \| {re.escape(heading)} \|.*\n\|[-|]+\n"
    tables = re.findall(rf"{start}((?:\|.*\n)+)", (ROOT / "docs" / "modifiers.md").read_text(), re.MULTILINE)
    return sorted(re.findall(r"`(\w+)`", "\n".join(row.split("|")[1] for rows in tables for row in rows.splitlines())))


def test_the_tables_name_every_modifier_once():
    assert names_in_tables("takes") == sorted(modifiers.modules())


def test_the_tables_name_every_recipe_once():
    assert names_in_tables("take it for") == sorted(p.stem for p in (ROOT / "conf" / "compress").glob("*.yaml"))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_the_modifiers_that_a_page_names_exist(page):
    text = page.read_text()
    bases = "".join(path.read_text() for path in (ROOT / "lightning_compress" / "layerwise").glob("*.py"))
    known = {*modifiers.__all__, *re.findall(r"^class (\w+)", text + bases, re.MULTILINE)}
    assert set(re.findall(r"\b[A-Z]\w*Modifier\b", text)) <= known


def overrides(page: Path) -> list[list[str]]:
    """What follows ``python train.py`` in the page's commands; of a sweep its first run."""
    lines = [line for text in blocks(page, "bash") for line in text.splitlines() if line.startswith("python train.py ")]
    commands = [shlex.split(line, comments=True)[2:] for line in lines]
    return [[re.sub(r"^([^\[{]*?),.*", r"\1", word) for word in words if word != "-m"] for words in commands]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_compose(page, tmp_path):
    """And what they set is known to the callback and its modifiers, which Hydra leaves to them."""
    for text in blocks(page, "yaml"):
        if "compress:" in text:
            (tmp_path / "compress").mkdir(exist_ok=True)
            (tmp_path / "compress" / "mine.yaml").write_text(text)
    for words in overrides(page):
        words = [word for word in words if not word.startswith(("--", "hydra/launcher", "hydra.launcher"))]
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            config = compose("train", [*words, f"hydra.searchpath=[file://{tmp_path}]"], return_hydra_config=True)
        assert not any("compress=" in word for word in words) or instantiate(config.callbacks.compress), words
