"""Spaces and heads of a run; the tracer sees operators, operations in place and assignments, and can sleep."""

import pytest
import torch
from torch import nn

from lightning_compress.modifiers.rotation.follow import BasisTracer, follow
from tests.support.rotation_models import build


def trace(model):
    ids = torch.arange(12).reshape(2, 6)
    cached = {"use_cache": False} if hasattr(model, "config") else {}
    return follow(model, lambda: model(ids, **cached))


def stream(model):
    return next(space for space in trace(model).spaces if space.sources)


def test_sources_writers_and_readers_of_a_llama():
    space = stream(build("llama"))
    layers = [f"model.layers.{i}." for i in range(2)]
    assert {t.slot.name for t in space.sources} == {"model.embed_tokens.weight"}
    assert {(t.slot.module, t.dim) for t in space.writers} == {
        (layer + name, 0) for layer in layers for name in ("self_attn.o_proj", "mlp.down_proj")
    }
    attention, mlp = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
    expected = {(f"{layer}self_attn.{name}", f"{layer}input_layernorm") for layer in layers for name in attention}
    expected |= {(f"{layer}mlp.{name}", f"{layer}post_attention_layernorm") for layer in layers for name in mlp}
    assert {(t.slot.module, t.norm.module) for t in space.readers} == expected | {("lm_head", "model.norm")}
    assert all(t.dim == 1 for t in space.readers)


def test_heads_of_a_llama_are_its_values_and_outputs():
    heads = trace(build("llama")).heads
    assert [(h.value[0].slot.module, h.output.slot.module, h.size) for h in heads] == [
        (f"model.layers.{i}.self_attn.v_proj", f"model.layers.{i}.self_attn.o_proj", 8) for i in range(2)
    ]


@pytest.mark.parametrize("kind", ["gpt2", "phi3"])
def test_values_that_are_rows_of_a_fused_projection(kind):
    head = trace(build(kind)).heads[0]
    rows = {"gpt2": (64, 96), "phi3": (48, 64)}[kind]
    assert (head.value[0].start, head.value[0].stop) == rows
    assert head.size == 8


def test_experts_are_dimensions_of_one_tensor():
    space = stream(build("mixtral"))
    prefix = "model.layers.0.mlp."
    touches = {(t.slot.name.removeprefix(prefix), t.dim) for t in space.touches if t.slot.name.startswith(prefix)}
    assert touches == {("gate.weight", 1), ("experts.gate_up_proj", 2), ("experts.down_proj", 1)}


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
