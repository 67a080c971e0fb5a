"""Checks on a GPU are read together, in order, and find what checks on the CPU find at once."""

import pytest
import torch

from lightning_compress.calibration.finite_checks import FiniteChecks
from tests.support.fake_cuda import fake_cuda

MASK = torch.tensor([[True, True, False], [True, False, False]])
KINDS = {
    "finite": (torch.full((2, 3, 4), 3e38), None),  # the sum is not
    "NaN": (torch.zeros(2, 3, 4).index_fill(2, torch.tensor([1]), torch.nan), "NaN"),
    "Inf": (torch.zeros(2, 3, 4).index_fill(2, torch.tensor([1]), -torch.inf), "Inf"),
    "NaN beside Inf": (torch.tensor([[[torch.inf, torch.nan]]]), "NaN"),
    "padding": (torch.zeros(2, 3, 4).masked_fill(~MASK[..., None], torch.nan), None),
    "whole numbers": (torch.ones(2, 3, dtype=torch.int64), None),
    "nothing": (torch.ones(0, dtype=torch.float32), None),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", KINDS)
def test_both_devices_find_the_same(name, dtype):
    tensor, kind = KINDS[name]
    tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor

    def found(tensor, mask):
        checks = FiniteChecks()
        try:
            checks.add({"a": (tensor,)}, mask, ValueError)
            checks.read()
        except ValueError as error:
            return error.args[0]
        return None

    assert found(tensor, MASK) == kind
    with fake_cuda():
        assert found(tensor.to("cuda:0"), MASK.to("cuda:0")) == kind


def test_a_gpu_is_waited_for_once_and_the_first_error_is_raised():
    checks, names = FiniteChecks(), []
    with fake_cuda() as gpu:
        for i, value in enumerate([1.0, torch.inf, torch.nan]):
            x = torch.full((3,), value, dtype=torch.float32, device="cuda:0")
            checks.add(x, None, lambda kind, i=i: names.append((i, kind)) or ValueError(kind))
        assert gpu.syncs.total() == 0
        with pytest.raises(ValueError, match="Inf"):
            checks.read()
        assert gpu.syncs.total() == 1
        checks.read()  # nothing waits any more
    assert names == [(1, "Inf")]
