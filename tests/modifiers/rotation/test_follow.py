"""Spaces and heads of a run: sources, writers, readers behind norms, and values of attentions."""

import pytest
import torch

from lightning_compress.modifiers.rotation.follow import follow
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
