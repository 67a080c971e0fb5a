"""Whether a kernel runs: the version of Triton, the device, the case at hand; and the warning where it does not."""

import importlib.metadata
import importlib.util
import warnings

import pytest
import torch

from lightning_compress.ops import availability
from lightning_compress.ops.availability import calls_kernel, kernel_runs

CUDA = torch.device("cuda:0")


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(availability, "triton_version", lambda: (3, 6))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))


def test_a_kernel_runs_unless_the_case_does_not_fit(gpu):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernel_runs(CUDA, "torch computes it")
    expected = "^torch computes it, without a fused kernel: the group size 48 is not a multiple of 32$"
    with pytest.warns(UserWarning, match=expected):
        assert not kernel_runs(CUDA, "torch computes it", "the group size 48 is not a multiple of 32")


def test_an_unknown_version_of_triton_is_tried(gpu, monkeypatch):
    monkeypatch.setattr(availability, "triton_version", lambda: None)
    assert kernel_runs(CUDA, "torch computes it")


def test_a_kernel_is_called_for_plain_tensors_and_parameters_on_cuda_alone(monkeypatch):
    class Wrapped(torch.Tensor):
        pass

    x = torch.zeros(1)
    assert not calls_kernel(x)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    assert [calls_kernel(t) for t in (x, torch.nn.Parameter(x), x.as_subclass(Wrapped))] == [True, True, False]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not calls_kernel(x)


@pytest.mark.parametrize(
    ("installed", "version"),
    [
        ({"triton": "3.9.0"}, (3, 9)), ({"triton": "3.10.1+cu130"}, (3, 10)), ({"pytorch-triton": "3.5.0"}, (3, 5)),
        ({"triton": "unknown"}, None), ({}, None),
    ],
)  # fmt: skip
def test_the_version_of_triton_is_that_of_its_distribution(installed, version, monkeypatch):
    def of(name):
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", of)
    assert availability.triton_version.__wrapped__() == version
