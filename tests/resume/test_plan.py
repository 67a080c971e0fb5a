"""Fingerprints of a calibration, and what differs between two."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from lightning_compress.calibration.options import CalibrationOptions
from lightning_compress.modifiers.gptq.modifier import GPTQModifier
from lightning_compress.resume.plan import (
    batch_digest,
    difference,
    make_plan,
    model_digests,
    read_plan,
    tensor_digest,
    write_plan,
)


@dataclass
class Batch:
    x: torch.Tensor
    name: str = "a"


X = torch.arange(6.0).view(2, 3)
BATCHES = [X, X.view(3, 2), X.int(), X + 1, -X * 0, X * 0, [X], (X,), {"x": X}, {"y": X}, {"x": X, "n": 1},
           Batch(X), Batch(X, "b"), Batch(X + 1), None, 1, 1.0, "1", b"1", [X, X], [[X], X], [X, [X]]]  # fmt: skip


def test_batches_that_differ_in_anything_have_other_digests():
    """Values, signs of zero, shapes, dtypes, names, nesting."""
    assert len({batch_digest(batch) for batch in BATCHES}) == len(BATCHES)
    assert [batch_digest(copy.deepcopy(batch)) for batch in BATCHES] == [batch_digest(batch) for batch in BATCHES]
    assert batch_digest(X.t().contiguous().t()) == batch_digest(X)  # the same values in another layout


def test_the_digest_of_a_tensor_says_its_dtype_and_shape():
    digest = tensor_digest(torch.zeros(2, 3, dtype=torch.bfloat16))
    assert digest.startswith("bfloat16 [2, 3] sha256 ")
    assert tensor_digest(torch.zeros(2, 3, dtype=torch.bfloat16).t().contiguous().t()) == digest
    assert tensor_digest(torch.tensor(1.0)).startswith("float32 [] sha256 ")


def plan(model=None, threads=None, **options):
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    made = make_plan(
        [GPTQModifier(scheme="W4A16")], model, model_digests(model), ["a", "b"], ["0"], CalibrationOptions(**options)
    )
    if threads:
        made["machine"]["threads"] = threads
    return made


def test_a_plan_comes_back_from_its_file_and_differs_in_nothing(tmp_path):
    write_plan(tmp_path / "plan.json", plan())
    assert difference(read_plan(tmp_path / "plan.json"), plan()) == ""


def test_every_difference_is_named():
    smaller = nn.Sequential(nn.Linear(4, 4))
    larger = nn.Sequential(copy.deepcopy(smaller[0]), nn.Linear(2, 2, bias=False))
    found = difference(plan(smaller), plan(larger))
    assert found.startswith("the model: 1 entries, such as 1.weight (absent, now float32 [2, 2] sha256 ")
    changed = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    assert "such as 1.running_mean" in difference(plan(changed), _with(changed, "1.running_mean"))
    assert difference(plan(), plan(seed=3)) == "the walk: seed: 0 -> 3"
    assert difference(plan(threads=1), plan(threads=8)) == "the machine: threads: 1 -> 8"
    other = plan()
    other["versions"]["torch"] = "1.0"
    assert difference(plan(), other) == f"the versions: torch: {torch.__version__!r} -> '1.0'"


def _with(model, buffer):
    model = copy.deepcopy(model)
    model.get_buffer(buffer).add_(1)
    return plan(model)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format_version": 2}', "[" * 100_000, "\ud800"], ids=range(7))
def test_a_file_that_is_not_a_plan_is_refused(tmp_path, text):
    path = tmp_path / "plan.json"
    path.write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(ValueError, match="."):
        read_plan(path)
