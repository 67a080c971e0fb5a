"""Constraints that install the lowest versions that pyproject.toml allows:  python scripts/lowest_versions.py"""

import re
import tomllib
from pathlib import Path

EXTRAS = ("hf", "plot", "structured", "kernels")  # what users install; tools of `dev` are not pinned


def lowest(pyproject: Path) -> list[str]:
    """``name==version`` of the lower bound of every dependency; one without a bound is an error."""
    project = tomllib.loads(pyproject.read_text())["project"]
    requirements = [*project["dependencies"], *(r for extra in EXTRAS for r in project["optional-dependencies"][extra])]
    bounds = {requirement: re.match(r"([\w-]+)(?:\[.*\])?>=([\w.]+)", requirement) for requirement in requirements}
    if unbounded := [requirement for requirement, bound in bounds.items() if bound is None]:
        raise ValueError(
            f"{', '.join(unbounded)}: expected NAME>=VERSION first, the lowest version that the tests pass with"
        )
    return [f"{bound[1]}=={bound[2]}" for bound in bounds.values() if bound]


if __name__ == "__main__":
    print("\n".join(lowest(Path(__file__).parents[1] / "pyproject.toml")))
