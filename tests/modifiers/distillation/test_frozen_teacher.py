"""A teacher that answers and never moves."""

import pytest
import torch
from torch import nn

from lightning_compress.modifiers.distillation.frozen_teacher import FrozenTeacher
from lightning_compress.modifiers.distillation.teacher_source import build_teacher
from tests.support.training_loop import network

X = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))


def test_a_copy_is_frozen_and_apart():
    model = network()
    model.train()
    teacher = build_teacher("self", model)
    assert teacher is not model
    assert not teacher.training
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in teacher.parameters())
    with torch.no_grad():
        model[0].weight.zero_()
    assert torch.equal(teacher(X), network().eval()(X))


def test_a_callable_is_taken_as_it_is():
    double = FrozenTeacher(lambda x: 2 * x, network())
    assert double.module is None
    assert torch.equal(double.ask((X,), {"labels": X}), 2 * X)


def test_it_computes_in_its_own_dtype():
    teacher = FrozenTeacher("self", network(), dtype="bfloat16")
    assert teacher.ask((X,), {}).dtype == torch.bfloat16
    assert teacher.hash != FrozenTeacher("self", network()).hash
    nested = FrozenTeacher(_Nested(), network(), dtype="float16")
    assert nested.ask((), {"x": {"a": [X]}}).dtype == torch.float16


class _Nested(nn.Linear):
    def __init__(self):
        super().__init__(16, 2)

    def forward(self, x):
        return super().forward(x["a"][0])


def test_a_teacher_that_moves_with_the_model_is_refused():
    model = network()
    with pytest.raises(ValueError, match=r"shares 4 parameters with the model \(\['0.weight'.*give teacher='self'"):
        build_teacher(model, model)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="shares 2 parameters"):
        build_teacher(nn.Sequential(model[0]), model)


def test_a_teacher_that_does_not_take_the_inputs_is_named():
    teacher = FrozenTeacher(nn.Linear(3, 8), network())
    with pytest.raises(ValueError, match=r"cannot be called with the model's inputs, of shapes \[\(5, 16\)\]: mat1"):
        teacher.ask((X,), {})
    embedding = FrozenTeacher(nn.Embedding(4, 8), network())
    with pytest.raises(ValueError, match="cannot be called with the model's inputs.*index out of range"):
        embedding.ask((torch.tensor([[9]]),), {})
