"""The workflows, the site and the promises of pyproject.toml name things that exist, and agree with each other."""

import importlib.util
import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line[:60])

each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


def steps(path: Path) -> Iterator[dict[str, Any]]:
    for job in yaml.safe_load(path.read_text())["jobs"].values():
        yield from job["steps"]


def commands(path: Path) -> str:
    return "\n".join(step["run"] for step in steps(path) if "run" in step)


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- workflows ---------------------------------------------------------------------------------------------------------


def targets_of_make() -> dict[str, str]:
    """Target -> its prerequisites, of the Makefile and of what it includes."""
    files = [ROOT / "Makefile", *(ROOT / name for name in re.findall(r"^include (.+)$", MAKEFILE, re.MULTILINE))]
    return dict(re.findall(r"^([a-z][a-z-]*):([^=\n#]*)", "\n".join(file.read_text() for file in files), re.MULTILINE))


MAKEFILE = (ROOT / "Makefile").read_text()


def test_a_release_makes_every_relative_link_of_the_readme_absolute():
    base = "https://host/owner/name/blob/v1"
    text = script("readme_links").absolute((ROOT / "README.md").read_text(), base)
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert f"{base}/docs/images/report.png?raw=true" in targets
    assert f"{base}/docs/choosing.md" in targets
    assert all(target.startswith("https://") for target in targets)
    assert "readme_links.py" in commands(ROOT / ".github" / "workflows" / "release.yml").partition("make dist")[0]


def test_there_is_a_workflow_for_each_purpose():
    assert [path.stem for path in WORKFLOWS] == ["docs", "lint", "release", "test"]


def test_the_paths_in_makefiles_exist():
    makefiles = [ROOT / "Makefile", *ROOT.glob("benchmarks/*.mk"), *ROOT.glob("scripts/slurm/*.mk"), *WORKFLOWS]
    paths = {
        p for f in makefiles for p in re.findall(r"\b(?:tests|scripts|benchmarks|conf)/[\w/]+\.\w+", f.read_text())
    }
    assert paths
    assert not [path for path in paths if not (ROOT / path).exists()]


@each_workflow
def test_workflows_call_targets_and_files_that_exist(path):
    called = set(re.findall(r"\bmake ([a-z-]+)", commands(path)))
    assert called <= set(targets_of_make())
    named = re.findall(r"[\w./-]+/[\w-]+\.(?:py|sh|txt|toml)\b", commands(path).replace('"$GITHUB_WORKSPACE/', '"'))
    named += [step["with"]["cache-dependency-path"] for step in steps(path) if "cache" in step.get("with", {})]
    assert not [name for name in named if not (ROOT / name).is_file()]


@each_workflow
def test_workflows_run_the_pythons_of_the_classifiers(path):
    jobs = yaml.safe_load(path.read_text())["jobs"].values()
    matrices = [job["strategy"]["matrix"] for job in jobs if "matrix" in job.get("strategy", {})]
    assert all(matrix["python-version"] == PYTHONS for matrix in matrices)
    assert bool(matrices) == (path.stem in ("test", "release"))
    chosen = [str(step["with"]["python-version"]) for step in steps(path) if "setup-python" in step.get("uses", "")]
    assert set(chosen) - {"${{ matrix.python-version }}"} <= set(PYTHONS)


def test_the_lowest_python_of_the_classifiers_is_the_one_that_pip_asks_for():
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"


@each_workflow
def test_workflows_take_torch_from_the_index_for_cpus(path):
    content = yaml.safe_load(path.read_text())
    sets_up = [name for name in re.findall(r"\bmake ([a-z-]+)", commands(path)) if "READY" in targets_of_make()[name]]
    with_torch = any("DOCS_READY" not in targets_of_make()[name] for name in sets_up)
    assert ("TORCH_INDEX" in content.get("env", {})) == with_torch
    assert set(re.findall(r"https?://([\w.-]+)", path.read_text())) <= {"download.pytorch.org"}


@each_workflow
def test_workflows_hold_no_secret_and_may_only_read(path):
    content = yaml.safe_load(path.read_text())
    assert "secrets." not in path.read_text()
    assert content["permissions"] == {"contents": "read"}
    grants = {name: job["permissions"] for name, job in content["jobs"].items() if "permissions" in job}
    assert grants == ({"publish": {"id-token": "write"}} if path.stem == "release" else {})
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@[\w/.-]+", step["uses"]) for step in steps(path) if "uses" in step)


def test_the_forms_for_issues_ask_something():
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"):
        form = yaml.safe_load(path.read_text())
        assert {"name", "description", "body"} <= set(form), path.name
        ids = [field["id"] for field in form["body"] if field["type"] != "markdown"]
        assert ids
        assert len(ids) == len(set(ids))


# -- versions ----------------------------------------------------------------------------------------------------------


def test_pre_commit_runs_the_pinned_ruff():
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    revisions = {Path(entry["repo"]).name: entry["rev"] for entry in repositories}
    assert revisions["ruff-pre-commit"] == f"v{PINS['ruff']}"


def test_pins_keep_the_promises_of_pyproject():
    everything = [*PROJECT["dependencies"], *(r for extra in PROJECT["optional-dependencies"].values() for r in extra)]
    requirements = [Requirement(text) for text in everything]
    pins = {name.lower(): version for name, version in PINS.items()}
    broken = [str(r) for r in requirements if r.name.lower() in pins and pins[r.name.lower()] not in r.specifier]
    assert not broken


def test_lowest_versions_are_allowed_by_their_own_requirements():
    lines = script("lowest_versions").lowest(ROOT / "pyproject.toml")
    lowest = dict(line.split("==") for line in lines)
    requirements = {(r := Requirement(text)).name: r for text in PROJECT["dependencies"]}
    assert set(requirements) <= set(lowest)
    assert all(lowest[name] in requirement.specifier for name, requirement in requirements.items())
    assert Version(lowest["torch"]) < Version(PINS["torch"])


def test_a_dependency_without_a_lower_bound_is_refused(tmp_path):
    extras = "\n".join(f"{extra} = []" for extra in script("lowest_versions").EXTRAS)
    text = f'[project]\ndependencies = ["numpy", "rich>=13"]\n[project.optional-dependencies]\n{extras}\n'
    (tmp_path / "pyproject.toml").write_text(text)
    with pytest.raises(ValueError, match="^numpy: expected NAME>=VERSION first"):
        script("lowest_versions").lowest(tmp_path / "pyproject.toml")


def test_the_changelog_has_the_version_and_room_for_the_next():
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert PROJECT["version"] in headings
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == PROJECT["version"]


# -- the site ----------------------------------------------------------------------------------------------------------


def pages_of_nav(entries: list[Any]) -> Iterator[str]:
    for entry in entries:
        for value in entry.values():
            yield from [value] if isinstance(value, str) else pages_of_nav(value)


def test_every_page_is_in_the_navigation_once():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert sorted(pages_of_nav(config["nav"])) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def test_every_public_name_has_its_place_among_the_api_pages():
    import lightning_compress

    names = re.findall(r"^::: lightning_compress\..*?(\w+)$", "\n".join(script("docs_site").api_pages().values()), re.M)
    assert Counter(names) == Counter([*lightning_compress.__all__, "recipe"])


def test_a_public_name_that_is_not_a_modifier_asks_for_a_page(monkeypatch):
    site = script("docs_site")
    placed = [name for _, names in site.PAGES.values() for name in names]
    monkeypatch.setattr(site, "public_names", lambda: dict.fromkeys([*placed, "GPTQModifier", "sweep"], "m"))
    with pytest.raises(ValueError, match="^no page for sweep; name one in PAGES of scripts/docs_site.py$"):
        site.api_pages()


def test_the_readme_of_every_kernel_is_a_page_and_links_lead_there():
    site = script("docs_site")
    links = re.findall(r"\]\(\.\./lightning_compress/ops/.*?\)", (ROOT / "docs" / "kernels.md").read_text())
    targets = {site.on_page_markdown(f"[x{link}").removeprefix("[x](").removesuffix(")") for link in links}
    assert targets == set(site.kernel_pages())
    assert site.on_page_markdown("see [results](../benchmarks/results).") == "see results."
