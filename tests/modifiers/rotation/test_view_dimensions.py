"""Dimensions of views, against the data: a marker along each dimension shows where it went."""

import pytest
import torch

from lightning_compress.modifiers.rotation.view_dimensions import dims_of_view, keeps_last

W = torch.arange(6.0).view(2, 3)


@pytest.mark.parametrize(("name", "view", "dims"), [
    ("t", W.t(), (1, 0)),
    ("transpose", W.transpose(0, 1), (1, 0)),
    ("permute", W.permute(1, 0), (1, 0)),
    ("contiguous", W.contiguous(), (0, 1)),
    ("getitem", W[0], (1,)),
    ("getitem", W[:1], (0, 1)),
    ("unsqueeze", W[None], (0, 0, 1)),
    ("view", W.view(3, 2), None),
    ("flatten", W.flatten(), None),
])  # fmt: skip
def test_dimensions_of_a_parameter(name, view, dims):
    assert dims_of_view(name, W, view, (0, 1)) == dims


def test_dimensions_of_a_view_of_a_view():
    assert dims_of_view("t", W.t(), W, (1, 0)) == (0, 1)
    E_EFC = torch.zeros(4, 2, 3)  # experts in one tensor
    assert dims_of_view("getitem", E_EFC, E_EFC[1], (0, 1, 2)) == (1, 2)
    assert dims_of_view("transpose", E_EFC, E_EFC.transpose(1, 2), (0, 1, 2)) == (0, 2, 1)


@pytest.mark.parametrize(("name", "args", "kwargs"), [
    ("transpose", (0, 1), {}), ("permute", (1, 0, 2), {}), ("getitem", (slice(1),), {}),
    ("getitem", ((..., None, slice(None)),), {}), ("repeat", (2, 1, 1), {}), ("narrow", (1, 0, 2), {}),
    ("index_select", (0, torch.tensor([1])), {}), ("masked_fill", (torch.ones(2, 3, 1) > 0, 0), {}),
])  # fmt: skip
def test_operations_that_keep_the_last_dimension(name, args, kwargs):
    check(name, args, kwargs, expected=True)


@pytest.mark.parametrize(("name", "args", "kwargs"), [
    ("transpose", (1, 2), {}), ("permute", (0, 2, 1), {}), ("getitem", ((..., slice(None, None, 1)),), {}),
    ("repeat", (1, 1, 2), {}), ("masked_fill", (torch.ones(2, 3, 1) > 0, 2.0), {}),
    ("masked_fill", (torch.ones(4) > 0, 0), {}), ("index_select", (2, torch.arange(4)), {}),
])  # fmt: skip
def test_operations_that_do_not(name, args, kwargs):
    check(name, args, kwargs, expected=False)


def check(name, args, kwargs, expected):
    x = torch.randn(2, 3, 4)
    out = x[args[0]] if name == "getitem" else getattr(x, name)(*args, **kwargs)
    assert keeps_last(name, x, (x, *args), kwargs, out) == expected
