"""Every kind of recipe, in train.py and in a template app, on two ranks that are started in each of Lightning's ways.

Ranks hold equal weights; the exported files are those of one process, bit for bit; and a process without this package
reads from them what the model of the run answers.
"""

import csv
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from lightning_compress import load
from tests.support.export_models import without_errors
from tests.support.plain_reader import plain_transformers
from tests.support.strategy_runs import ROOT, SMALL, STRATEGIES, TEMPLATE, TRAIN_PY, fixed_ids, run
from tests.support.template_app import DenseNet
from tests.support.template_reader import fixed_batch

QUICK = {("train.py", "gptq_w4"), ("train.py", "stack_qat"), ("template", "structured")}
QUANTIZED_INPUTS = ("w8a8", "qat_w8a8")  # by kernels of int8, that round the last bit otherwise
SINGLE = "32-true"
CASES = [
    pytest.param(app, kind, strategy, SINGLE, marks=[] if (app, kind) in QUICK else pytest.mark.slow)
    for app, kinds in (("train.py", TRAIN_PY), ("template", TEMPLATE))
    for kind in kinds
    for strategy in STRATEGIES
    if strategy != "one"
]
IN_HALF = [
    "gptq_w4",
    "awq_w4",
    "smoothquant_gptq_w8a8",
    "autoround_w4",
    "gptq_w3_training_step",
    "sparsegpt_50",
    "wanda_owl",
    "qat_w4",
    "rotate",
]
CASES += [
    pytest.param("train.py", kind, "ddp", precision, marks=[] if kind == "gptq_w4" else pytest.mark.slow)
    for kind in IN_HALF
    for precision in ("bf16-true", "bf16-mixed")
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of Python files; every part of the split gets some."""
    folder = tmp_path_factory.mktemp("library")
    for i in range(60):
        (folder / f"module_{i}.py").write_text(f"def f_{i}(x):\n    return [x * {i}, {i * i}]\n" * 20)
    return folder


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory, library: Path) -> Callable[..., Path]:
    """The folder of the run on one process, which is made when it is first asked for."""
    root = tmp_path_factory.mktemp("one")

    def folder_of(app: str, kind: str, precision: str = SINGLE) -> Path:
        folder = root / f"{app}-{kind}-{precision}"
        if not folder.exists():
            run(app, kind, "one", folder, library, precision)
        return folder

    return folder_of


@pytest.fixture(scope="module")
def read_plainly(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with plain_transformers(tmp_path_factory.mktemp("read")) as read:
        yield read


@pytest.mark.parametrize(("app", "kind", "strategy", "precision"), CASES)
def test_two_ranks_export_what_one_process_exports(
    tmp_path: Path, library: Path, one_process: Any, read_plainly: Any, app: str, kind: str, strategy: str,
    precision: str,
) -> None:  # fmt: skip
    folder = tmp_path / "run"
    run(app, kind, strategy, folder, library, precision)
    zero, one = (torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert zero["state"].keys() == one["state"].keys()
    assert [name for name in zero["state"] if not torch.equal(zero["state"][name], one["state"][name])] == []
    assert torch.equal(zero["answer"], one["answer"])
    if strategy != "shares":
        assert exported(folder) == exported(one_process(app, kind, precision))
    if app == "train.py":
        answer = read_plainly(folder / "compressed", {"input_ids": fixed_ids()})
        rounds_buffers = precision == "bf16-true"  # inv_freq in the Trainer, and plain transformers does not
        assert_close(answer, zero["answer"], rtol=0, atol=2**-6 if rounds_buffers else 0)
    else:
        with torch.no_grad():
            answer = load(folder / "compressed", DenseNet()).eval()(fixed_batch())
        assert_close(answer, zero["answer"], rtol=0, atol=1e-6 if kind in QUANTIZED_INPUTS else 0)


@pytest.mark.slow  # each process imports anew
@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn"])
def test_the_launchers_of_lightning_start_the_ranks_themselves(
    tmp_path: Path, library: Path, one_process: Any, strategy: str
) -> None:
    folder = tmp_path / "run"
    options = ["trainer.devices=2", f"++trainer.strategy={strategy}", "++trainer.use_distributed_sampler=false"]
    overrides = [*SMALL, *TRAIN_PY["gptq_w4"], *options, f"+data.folder={library}", f"hydra.run.dir={folder}"]
    subprocess.run([sys.executable, str(ROOT / "train.py"), *overrides], cwd=ROOT, check=True, timeout=250)
    assert exported(folder) == exported(one_process("train.py", "gptq_w4"))


def exported(folder: Path) -> dict[str, Any]:
    """The files of the export, and the rows of the report; without the name of the run, and times."""
    files = {path.name: path.read_bytes() for path in sorted((folder / "compressed").iterdir())}
    del files["export_manifest.json"]
    files["README.md"] = without_errors(files["README.md"])
    with (folder / "report" / "modules.csv").open() as file:
        rows = [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]
    return {**files, "rows": rows}
