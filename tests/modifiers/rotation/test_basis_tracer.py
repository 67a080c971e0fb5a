"""The tracer sees operators, operations in place and assignments, and nothing while it sleeps."""

import pytest
import torch
from torch import nn

from lightning_compress.modifiers.rotation.basis_tracer import BasisTracer


def fixed(operation):
    """Why the space of embeddings cannot be turned after an operation on one of its vectors."""
    table = nn.Embedding(8, 4)
    tracer = BasisTracer(table)
    with torch.no_grad(), tracer:
        operation(table(torch.arange(6).view(2, 3)))
    (space,) = {id(space.root()): space.root() for space in tracer.marks.spaces if space.root().sources}.values()
    return space.fixed


def iadd(x):
    y = x * 2
    y += x
    y *= 2
    y /= 2
    return y


def assign(x):
    buffer = x.new_zeros(2, 3, 4)
    buffer[:, 1:] = x[:, 1:]
    return buffer


def assign_number(x):
    mask = torch.ones(3)
    mask[1] = 0
    return x * mask[:, None]


@pytest.mark.parametrize("operation", [iadd, assign, assign_number, lambda x: 2 * x + x, lambda x: x.shape])
def test_operations_that_keep_the_basis(operation):
    assert fixed(operation) == ""


@pytest.mark.parametrize(("operation", "reason"), [
    (lambda x: x[0, 0, 0].item(), "getitem takes its features apart"),
    (lambda x: x.tolist(), "tolist needs it as it is"),
    (lambda x: x.sin_(), "sin needs it as it is"),
    (lambda x: x.sort(-1), "sort needs it as it is"),
])  # fmt: skip
def test_operations_that_fix_it(operation, reason):
    assert fixed(operation) == reason


def test_nothing_is_recorded_while_the_tracer_sleeps():
    table = nn.Embedding(8, 4)
    tracer = BasisTracer(table)
    tracer.asleep += 1
    with torch.no_grad(), tracer:
        table(torch.arange(2)).sin()
    assert not tracer.marks.spaces
