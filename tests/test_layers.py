"""The house rules, read from the source: who may import whom, no cycles, no shared mutable state, no helper files."""

import ast
import importlib
import re
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path

import pytest

PACKAGE = "lightning_compress"
ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / PACKAGE).rglob("*.py"))

INDEX = ROOT / "docs" / "index.md"


def rules(heading: str) -> dict[str, list[set[str]]]:
    """A table of docs/index.md: the name in the first column -> the names in each of the others."""
    section = INDEX.read_text().split(f"\n{heading}\n", 1)[1]
    rows = re.findall(r"^\|(.*)\|$", section.split("\n#", 1)[0], re.MULTILINE)[2:]
    cells = [[set(re.findall(r"[\w.]+", cell.replace("nothing", ""))) for cell in row.split("|")] for row in rows]
    return {name: [*others] for first, *others in cells for name in first}


# Layer -> other layers of this package that it may import, and packages from outside. A layer is the first name below
# the package: a folder or a file. torch and the standard library are free to all.
LAYERS = rules("## Who may import whom")
# Room -> other rooms of modifiers/ that it may import; a technique of one file is a room, too.
ROOMS = rules("### Between techniques")


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


MODULES = {module_of(path): path for path in FILES}
TREES = {module: ast.parse(path.read_text()) for module, path in MODULES.items()}


def imports(module: str, *, whole: bool = True) -> Iterator[tuple[str, int]]:
    """(absolute name, line) of what a module imports; with ``whole=False`` only what runs when it is imported."""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(TREES[module]) if whole else _at_import(TREES[module]):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*up, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield (inner if inner in MODULES else base), node.lineno


def _at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Statements that run at import: no function bodies, no ``if TYPE_CHECKING``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _at_import(child)


@pytest.mark.parametrize("module", [m for m in MODULES if m != PACKAGE])
def test_imports_follow_the_layers(module):
    layer = layer_of(module)
    assert layer in LAYERS, f"{module}: a new layer {layer!r}; say in the table of docs/index.md what it may import"
    inside, outside = LAYERS[layer]
    wrong = []
    for name, line in imports(module):
        top, *_rest = name.split(".")
        if top != PACKAGE:
            fine = top in {"torch", *outside} or _is_stdlib(top)
        elif layer_of(name) == layer:
            fine = True
        else:
            fine = any(name == f"{PACKAGE}.{a}" or name.startswith(f"{PACKAGE}.{a}.") for a in inside)
        if not fine:
            wrong.append(f"{MODULES[module].relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def _is_stdlib(top: str) -> bool:
    import sys

    return top in sys.stdlib_module_names


def test_the_front_door_is_lazy():
    """Importing the package imports none of its layers: names load when they are asked for (PEP 562)."""
    outside = [(name, line) for name, line in imports(PACKAGE, whole=False) if not _is_stdlib(name.split(".")[0])]
    assert not outside, outside


def room_of(module: str) -> str:
    return module.split(".")[2] if module.startswith(f"{PACKAGE}.modifiers.") else ""


def test_a_technique_imports_another_one_only_where_the_list_says_so():
    for module in MODULES:
        rooms = {room_of(name) for name, _ in imports(module)} - {"", room_of(module)}
        if room := room_of(module):
            assert rooms <= ROOMS.get(room, [set()])[0], f"{module} imports {rooms}"


def test_there_is_no_import_cycle():
    """Over every import, also those inside functions: a cycle that is put off is a cycle."""
    edges = {m: {n for n, _ in imports(m) if n in MODULES and n != m} for m in MODULES if m != PACKAGE}
    edges = {m: {n for n in found if n != PACKAGE} for m, found in edges.items()}
    order: list[str] = []
    visiting: list[str] = []

    def visit(module: str) -> None:
        assert module not in visiting, "cycle: " + " -> ".join([*visiting[visiting.index(module) :], module])
        if module not in order:
            visiting.append(module)
            for name in sorted(edges[module]):
                visit(name)
            visiting.pop()
            order.append(module)

    for module in edges:
        visit(module)


@pytest.mark.parametrize("layer", sorted(LAYERS))
def test_the_table_of_layers_itself_has_no_cycle(layer):
    seen, todo = set(), list(LAYERS[layer][0])
    while todo:
        name = todo.pop().split(".")[0]
        assert name != layer, f"{layer} may reach itself"
        if name not in seen:
            seen.add(name)
            todo += LAYERS[name][0]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_says_what_it_is(path):
    assert path.stem not in {"utils", "util", "helpers", "helper", "base", "common", "misc"}, "find it a true name"
    assert ast.get_docstring(ast.parse(path.read_text())), f"{path.name} does not open by saying what it is"


@pytest.mark.parametrize("module", MODULES)
def test_nothing_at_module_level_changes(module):
    """No ``global``, and no function writes into a name of its module."""
    tree = TREES[module]
    own = {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    writers = {"append", "add", "update", "extend", "insert", "pop", "popitem", "clear", "setdefault", "remove"}
    wrong = []
    for function in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)):
        local = {a.arg for a in ast.walk(function) if isinstance(a, ast.arg)}
        local |= {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        shared = own - local
        for node in ast.walk(function):
            if isinstance(node, ast.Global):
                wrong.append(f"line {node.lineno}: global {', '.join(node.names)}")
            elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
                if isinstance(node.value, ast.Name) and node.value.id in shared:
                    wrong.append(f"line {node.lineno}: writes into {node.value.id}")
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in writers:
                if isinstance(node.func.value, ast.Name) and node.func.value.id in shared:
                    wrong.append(f"line {node.lineno}: {node.func.value.id}.{node.func.attr}(...)")
    assert not wrong, f"{module}: " + "; ".join(wrong)


FLOATS = {
    "FloatTensor", "Tensor", "empty", "empty_strided", "eye", "finfo", "full", "get_default_dtype", "linspace",
    "logspace", "normal", "ones", "rand", "randn", "scalar_tensor", "tensor", "zeros",
}  # fmt: skip
NUMBERS = {"arange", "randint", "randperm"}  # of whole numbers they are int64, whatever the default dtype is
NAMES_NO_DTYPE = {
    "core.precision": "it sets the default dtype and puts it back",
    "modifiers.rotation.norms": "the user's module is tried on numbers of the dtype that it is used to",
}


@pytest.mark.parametrize("module", MODULES)
def test_each_new_tensor_says_its_dtype(module):
    """Torch's default dtype belongs to the user: ``Trainer(precision="bf16-true")`` makes it bfloat16."""
    silent = []
    for node in ast.walk(TREES[module]):
        if not (isinstance(node, ast.Call) and ast.unparse(node.func).startswith("torch.")):
            continue
        name, named = ast.unparse(node.func).removeprefix("torch."), any(k.arg == "dtype" for k in node.keywords)
        fraction = any(isinstance(n, ast.Constant) and isinstance(n.value, float) for n in ast.walk(node))
        positional = name == "finfo" and bool(node.args)
        if (name in FLOATS or (name in NUMBERS and fraction)) and not named and not positional:
            silent.append(f"line {node.lineno}: {ast.unparse(node)}")
    if module.removeprefix(f"{PACKAGE}.") not in NAMES_NO_DTYPE:
        assert not silent, f"{module}: name the dtype: " + "; ".join(silent)
    else:
        assert silent, f"{module} may leave the list"


@pytest.mark.parametrize("module", MODULES)
def test_each_new_tensor_says_its_device(module):
    """Torch's default device belongs to the user, too, and a tensor on the CPU must be meant to be there."""
    calls = [node for node in ast.walk(TREES[module]) if isinstance(node, ast.Call)]
    factories = {
        f"torch.{name}" for name in (FLOATS | NUMBERS) - {"FloatTensor", "Tensor", "finfo", "get_default_dtype"}
    }
    new = [call for call in calls if ast.unparse(call.func) in factories]
    silent = [c for c in new if not {"device", None} & {k.arg for k in c.keywords}]
    lines = [f"line {c.lineno}: {ast.unparse(c)}" for c in silent]
    assert not lines, f"{module}: name the device, such as device=x.device or 'cpu': " + "; ".join(lines)


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith(f"{PACKAGE}.ops.")])
def test_each_launch_of_a_kernel_enters_the_device_of_its_arguments(module):
    """Triton takes the current device and its stream, whatever the device of the tensors is."""
    guarded = {
        id(inner)
        for node in ast.walk(TREES[module])
        if isinstance(node, ast.With) and any("launching(" in ast.unparse(item.context_expr) for item in node.items)
        for inner in ast.walk(node)
    }
    calls = [node for node in ast.walk(TREES[module]) if isinstance(node, ast.Call)]
    launches = [c for c in calls if re.match(r"\w*_kernel(\[|\.run\b)", ast.unparse(c.func))]
    bare = [f"line {c.lineno}: {ast.unparse(c.func)}" for c in launches if id(c) not in guarded]
    assert not bare, f"{module}: write 'with launching(x):' around " + "; ".join(bare)
    assert launches or not module.endswith(".kernel") or "jit" not in MODULES[module].read_text()


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_alone(module):
    """Names in ``__all__`` exist, and each public module says which are public."""
    if module.endswith(".kernel"):
        pytest.importorskip("triton", reason="Triton is not installed: make test-kernels")
    loaded = importlib.import_module(module)
    for name in getattr(loaded, "__all__", []):
        assert hasattr(loaded, name), f"{module}.__all__ lists {name}"


def test_no_file_of_the_package_writes_print_or_reads_the_environment_for_its_maths():
    for module in MODULES:
        if layer_of(module) in {"core", "layers", "layerwise", "modifiers", "ops", "pruning", "quant"}:
            for node in ast.walk(TREES[module]):
                called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id
                assert called not in {"print", "eval", "exec"}, f"{module}:{node.lineno} calls {called}"


def test_what_is_imported_is_declared():
    """Every package that a layer may import is a dependency or an extra of pyproject.toml."""
    project = ROOT / "pyproject.toml"
    if not project.exists():
        pytest.skip("no pyproject.toml beside the package (an installed copy)")
    table = tomllib.loads(project.read_text())["project"]
    declared = " ".join([*table["dependencies"], *chain(*table.get("optional-dependencies", {}).values())]).lower()
    installed = packages_distributions()
    for module in MODULES:
        for name, line in imports(module):
            top = name.split(".")[0]
            if top not in (PACKAGE, "hydra_plugins") and not _is_stdlib(top):  # both are in the wheel
                names = [d.lower() for d in installed.get(top, [top])]
                assert any(n in declared for n in names), f"{module}:{line} imports {top}, which pyproject.toml lacks"


def test_objects_are_unpickled_only_from_ranks_and_from_files_that_this_process_saved():
    """``torch.load`` says ``weights_only=True`` everywhere but in the one module that knows who wrote the file.

    Messages between ranks are pickled, as those of torch.distributed are.
    """
    apps = [path for path in (ROOT / "train.py", *sorted((ROOT / "examples").rglob("*.py"))) if path.exists()]
    loads, unpickling = 0, []
    for path in (*FILES, *apps):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [getattr(node, "module", None), *(alias.name for alias in node.names)]
                assert not {"Unpickler", "loads", "dill", "cloudpickle", "joblib", "marshal", "shelve"} & {*names}, path
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            called = ast.unparse(node.func)
            if called in {"pickle.load", "pickle.loads", "pickle.Unpickler"}:
                unpickling.append(f"{path.relative_to(ROOT)}: {called}")
            if called == "torch.load" or node.func.attr in {"load_checkpoint", "load_from_checkpoint"}:
                said = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}.get("weights_only")
                if said != "True":
                    unpickling.append(f"{path.relative_to(ROOT)}: {called}")
                loads += 1
    here = "lightning_compress/training/saved_files.py"
    ranks = "lightning_compress/team.py: pickle.loads"
    assert unpickling == [ranks, f"{here}: torch.load", f"{here}: trainer.strategy.load_checkpoint"]
    assert loads >= 4
