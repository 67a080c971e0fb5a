"""Measures of the package, read from its source: lengths, nesting, arguments, docstrings, cycles, mirrored tests.

    python scripts/house.py                      # make house
    python scripts/house.py --commit c020411     # of another commit
    python scripts/house.py --against c020411    # two columns: that commit, and the working tree

Lengths of functions are lines from ``def`` to the last one, without the docstring. Nesting counts if, for, while, with,
try and match inside a function (an elif is as deep as its if; an inner function counts for itself). Arguments are those
of plain Python, without self and cls: Triton's functions and torch's ops follow their kernels. A test mirrors
``a/b.py`` when it is ``tests/a/test_b.py`` or ``tests/a/test_b_*.py``; a folder of ``ops`` is one module for that.
"""

import argparse
import ast
import io
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "lightning_compress"
LONGEST_FUNCTION, DEEPEST_NESTING, MOST_ARGUMENTS, LONGEST_FILE = 60, 5, 9, 400
OP_DECORATORS = ("jit", "autotune", "custom_op", "triton_op", "register_fake", "register_autograd", "register_kernel")
BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.TryStar, ast.Match)
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Function:
    """A function of the package; ``name`` is qualified, ``public``: no part of it is private or local."""

    file: str
    name: str
    lines: int
    nesting: int
    arguments: int
    public: bool
    documented: bool
    op: bool

    def __str__(self) -> str:
        return f"{self.file}: {self.name}"


@dataclass(frozen=True)
class House:
    """Source of a package by path inside of it, and the paths of its tests inside of their folder."""

    sources: dict[str, str]
    tests: set[str]

    @cached_property
    def trees(self) -> dict[str, ast.Module]:
        return {file: ast.parse(source) for file, source in self.sources.items()}

    @cached_property
    def lines(self) -> dict[str, int]:
        return {file: len(source.splitlines()) for file, source in self.sources.items()}

    @cached_property
    def functions(self) -> list[Function]:
        return [function for file, tree in self.trees.items() for function in _functions(file, tree, "", True)]

    @cached_property
    def long_functions(self) -> dict[str, int]:
        return {str(f): f.lines for f in self.functions if f.lines > LONGEST_FUNCTION}

    @cached_property
    def deep_functions(self) -> dict[str, int]:
        return {str(f): f.nesting for f in self.functions if f.nesting > DEEPEST_NESTING}

    @cached_property
    def wide_signatures(self) -> dict[str, int]:
        return {str(f): f.arguments for f in self.functions if f.arguments > MOST_ARGUMENTS and not f.op}

    @cached_property
    def long_files(self) -> dict[str, int]:
        return {file: n for file, n in self.lines.items() if n > LONGEST_FILE}

    @cached_property
    def long_files_without_reason(self) -> dict[str, int]:
        """Long files whose docstring does not name the limit (``Longer than 400 lines because ...``)."""
        reason = f"{LONGEST_FILE} lines"
        return {f: n for f, n in self.long_files.items() if reason not in (ast.get_docstring(self.trees[f]) or "")}

    @cached_property
    def cycles(self) -> list[list[str]]:
        """Groups of modules that import each other, also inside of functions; not through the package itself."""
        edges = {name: self._imports(name) for name in self._modules if name != PACKAGE}
        reach: dict[str, set[str]] = {}
        for start in edges:
            seen, todo = set(), [start]
            while todo:
                new = edges[todo.pop()] - seen
                seen |= new
                todo += new
            reach[start] = seen
        groups = {frozenset(m for m in reach[name] if name in reach[m]) for name in edges if name in reach[name]}
        return sorted(sorted(group) for group in groups)

    @cached_property
    def _modules(self) -> dict[str, str]:
        """File of each module by its dotted name."""
        parts = {file: PurePosixPath(PACKAGE, file).with_suffix("").parts for file in self.sources}
        return {".".join(p[:-1] if p[-1] == "__init__" else p): file for file, p in parts.items()}

    def _imports(self, module: str) -> set[str]:
        file, targets = self._modules[module], set()
        package = module if file.endswith("__init__.py") else module.rpartition(".")[0]
        for node in ast.walk(self.trees[file]):
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                outer = package.rsplit(".", node.level - 1)[0] if node.level else ""
                base = ".".join(filter(None, [outer, node.module]))
                inner = {f"{base}.{alias.name}" for alias in node.names}
                targets |= (inner & self._modules.keys()) | ({base} if inner - self._modules.keys() else set())
        return targets & self._modules.keys() - {module, PACKAGE}

    @cached_property
    def mirrored(self) -> dict[str, bool]:
        """Whether each file with more than imports has a test at its path."""
        return {file: self._has_test(PurePosixPath(file)) for file in self.sources if _holds_code(self.trees[file])}

    def _has_test(self, file: PurePosixPath) -> bool:
        if file.parts[0] == "ops" and len(file.parts) > 2:
            file = PurePosixPath("ops", file.parts[1])
        elif file.name == "__init__.py":
            file = file.parent if file.parts[1:] else PurePosixPath("front_door")
        prefix = str(file.with_name(f"test_{file.stem}"))
        return any(test == f"{prefix}.py" or test.startswith(f"{prefix}_") for test in self.tests)

    def figures(self) -> dict[str, str]:
        """The table, by the name of each measure."""
        deepest, most = max(f.nesting for f in self.functions), max(f.arguments for f in self.functions if not f.op)
        files, lengths = list(self.lines.values()), [f.lines for f in self.functions]
        return {
            "lines of the package": f"{sum(files):,}",
            "files": str(len(files)),
            "lines of a file: median, p90, most": _spread(files),
            f"files above {LONGEST_FILE} lines": str(len(self.long_files)),
            f"functions (above {LONGEST_FUNCTION} lines)": f"{len(lengths)} ({len(self.long_functions)})",
            "lines of a function: median, p90, most": _spread(lengths),
            f"deepest nesting (functions above {DEEPEST_NESTING})": f"{deepest} ({len(self.deep_functions)})",
            f"most arguments (signatures above {MOST_ARGUMENTS})": f"{most} ({len(self.wide_signatures)})",
            "public functions with a docstring": _share([f.documented for f in self.functions if f.public]),
            "functions with a docstring": _share([f.documented for f in self.functions]),
            "import cycles": str(len(self.cycles)),
            "modules with a mirrored test": _share(list(self.mirrored.values())),
        }

    def lists(self) -> dict[str, list[str]]:
        """Details behind the figures, by title."""
        longest = sorted(self.functions, key=lambda f: -f.lines)[:10]
        return {
            "longest functions": [f"{f.lines:4} {f}" for f in longest],
            f"nested deeper than {DEEPEST_NESTING}": [f"{n:4} {name}" for name, n in self.deep_functions.items()],
            f"more than {MOST_ARGUMENTS} arguments": [f"{n:4} {name}" for name, n in self.wide_signatures.items()],
            f"files above {LONGEST_FILE} lines": [f"{n:4} {file}" for file, n in self.long_files.items()],
            "of these, without a reason": list(self.long_files_without_reason),
            "import cycles": [" <-> ".join(cycle) for cycle in self.cycles],
            "modules without a mirrored test": [file for file, has in self.mirrored.items() if not has],
        }


def _functions(file: str, node: ast.AST, outer: str, public: bool) -> Iterator[Function]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, FunctionNode | ast.ClassDef):
            yield from _functions(file, child, outer, public)
            continue
        name, seen = f"{outer}{child.name}", public and not child.name.startswith("_")
        if isinstance(child, FunctionNode):
            documented = ast.get_docstring(child) is not None
            lines = _lines(child) - (_lines(child.body[0]) if documented else 0)
            decorators = ".".join(map(ast.unparse, child.decorator_list)).replace("(", ".").split(".")
            op = any(name in decorators for name in OP_DECORATORS)
            yield Function(file, name, lines, _nesting(child.body), _arguments(child), seen, documented, op)
        yield from _functions(file, child, f"{name}.", seen and isinstance(child, ast.ClassDef))


def _lines(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def _nesting(body: list[ast.stmt]) -> int:
    return max((_depth(node) for node in body if isinstance(node, BLOCKS)), default=0)


def _depth(node: ast.stmt) -> int:
    parts = [node, *getattr(node, "handlers", []), *getattr(node, "cases", [])]
    inner = [s for part in parts for name in ("body", "finalbody") for s in getattr(part, name, [])]
    other = getattr(node, "orelse", [])
    if isinstance(node, ast.If) and len(other) == 1 and other[0].col_offset == node.col_offset:  # elif
        return max(1 + _nesting(inner), _nesting(other))
    return 1 + _nesting([*inner, *other])


def _arguments(function: FunctionNode) -> int:
    a = function.args
    every = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, [a.vararg, a.kwarg])]
    return sum(argument.arg not in ("self", "cls") for argument in every)


def _holds_code(tree: ast.Module) -> bool:
    return any(isinstance(node, FunctionNode | ast.ClassDef | ast.If) for node in tree.body)


def _spread(values: list[int]) -> str:
    ranked = sorted(values)
    return f"{median(ranked):g}, {ranked[int(0.9 * (len(ranked) - 1))]}, {ranked[-1]}"


def _share(flags: list[bool]) -> str:
    return f"{sum(flags)} of {len(flags)} ({100 * sum(flags) / len(flags):.0f} %)"


def read(commit: str | None = None) -> House:
    """The package and the names of its tests, in the working tree or at a commit."""
    if commit is None:
        paths = [path for top in (PACKAGE, "tests") for path in (ROOT / top).rglob("*.py")]
        texts = {str(path.relative_to(ROOT)): path.read_text() for path in paths}
    else:
        packed = subprocess.run(["git", "archive", commit, PACKAGE, "tests"], cwd=ROOT, check=True, capture_output=True)
        with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
            opened = {m.name: archive.extractfile(m) for m in archive.getmembers() if m.name.endswith(".py")}
            texts = {name: file.read().decode() for name, file in opened.items() if file}
    inside = {name.partition("/")[2]: text for name, text in sorted(texts.items()) if name.startswith(f"{PACKAGE}/")}
    return House(inside, {name.partition("/")[2] for name in texts if name.startswith("tests/")})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", help="measure this commit instead of the working tree")
    parser.add_argument("--against", help="print the figures of this commit beside them")
    arguments = parser.parse_args()
    houses = [*([read(arguments.against)] if arguments.against else []), read(arguments.commit)]
    columns = [house.figures() for house in houses]
    for name in columns[-1]:
        print(f"{name:44}" + "".join(f"{column[name]:>24}" for column in columns))
    for title, lines in houses[-1].lists().items():
        print("\n".join([f"\n{title}", *(f"  {line}" for line in lines or ["none"])]))


if __name__ == "__main__":
    main()
