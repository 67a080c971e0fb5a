"""What a run shows: who shares a basis, who reads it through which norm, and what needs it as it is."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_compress.modifiers.rotation.follow import follow
from lightning_compress.modifiers.rotation.norms import recognize
from tests.support.rotation_models import build


def shown(model):
    ids = torch.arange(12).reshape(2, 6)
    cached = {"use_cache": False} if hasattr(model, "config") else {}
    return follow(model, lambda: model(ids, **cached))


def stream(model):
    return next(space for space in shown(model).spaces if space.sources)


class Net(nn.Module):
    """A stream with an operation of one's own in the middle."""

    def __init__(self, operation=None):
        super().__init__()
        self.table, self.norm, self.operation = nn.Embedding(16, 8), nn.LayerNorm(8), operation
        self.writer, self.head = nn.Linear(4, 8), nn.Linear(8, 4)
        self.shift = nn.Parameter(torch.ones(8))

    def forward(self, ids):
        x = self.table(ids)
        x = x + self.writer(torch.relu(self.head(self.norm(x))))
        x = x if self.operation is None else self.operation(self, x)
        return self.head(x)


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
    heads = shown(build("llama")).heads
    assert [(h.value[0].slot.module, h.output.slot.module, h.size) for h in heads] == [
        (f"model.layers.{i}.self_attn.v_proj", f"model.layers.{i}.self_attn.o_proj", 8) for i in range(2)
    ]


@pytest.mark.parametrize("kind", ["gpt2", "phi3"])
def test_values_that_are_rows_of_a_fused_projection(kind):
    head = shown(build(kind)).heads[0]
    rows = {"gpt2": (64, 96), "phi3": (48, 64)}[kind]
    assert (head.value[0].start, head.value[0].stop) == rows
    assert head.size == 8


def test_experts_are_dimensions_of_one_tensor():
    space = stream(build("mixtral"))
    prefix = "model.layers.0.mlp."
    touches = {(t.slot.name.removeprefix(prefix), t.dim) for t in space.touches if t.slot.name.startswith(prefix)}
    assert touches == {("gate.weight", 1), ("experts.gate_up_proj", 2), ("experts.down_proj", 1)}


@pytest.mark.parametrize("operation", [
    lambda net, x: x * 3, lambda net, x: 0.5 * x, lambda net, x: x / 2.0, lambda net, x: x - net.table.weight[0],
    lambda net, x: x.transpose(0, 1).contiguous().transpose(0, 1), lambda net, x: x[:, 1:], lambda net, x: x[0],
    lambda net, x: x.view(-1, 8), lambda net, x: x.unsqueeze(0).squeeze(0), lambda net, x: torch.cat([x, x], 1),
    lambda net, x: x * x.new_ones(2, 6, 1), lambda net, x: F.dropout(x, 0.5, False), lambda net, x: x + net.shift,
    lambda net, x: torch.zeros_like(x).index_add_(0, torch.tensor([1, 0]), x), lambda net, x: x.double().float(),
    lambda net, x: x.masked_fill(torch.zeros(2, 6, 1, dtype=torch.bool), 0), lambda net, x: x.chunk(2, 1)[1],
    lambda net, x: x.flatten(0, 1), lambda net, x: x[x.new_ones(2, 6, dtype=torch.bool)],
])  # fmt: skip
def test_operations_that_treat_all_bases_alike(operation):
    assert stream(Net(operation)).fixed == ""


@pytest.mark.parametrize(("operation", "reason"), [
    (lambda net, x: torch.sigmoid(x), "sigmoid needs it as it is"),
    (lambda net, x: x * net.shift, "mul needs it as it is"),
    (lambda net, x: x + 1, "add of something else needs it"),
    (lambda net, x: x + torch.ones(8), "add of something else needs it"),
    (lambda net, x: x.flip(-1), "flip needs it"),
    (lambda net, x: x[..., [1, 0, 2, 3, 4, 5, 6, 7]], "getitem takes its features apart"),
    (lambda net, x: x.view(2, 6, 2, 4).view(2, 6, 8), "view takes its features apart"),
    (lambda net, x: x.transpose(1, 2).transpose(1, 2), "transpose takes its features apart"),
    (lambda net, x: torch.cat(x.chunk(2, -1), -1), "chunk takes its features apart"),
    (lambda net, x: torch.cat([x, x], -1)[..., :8], "cat needs it"),
    (lambda net, x: x / x.abs(), "abs needs it"),
    (lambda net, x: 1 / (x + x), "needs it as it is"),
    (lambda net, x: x + net.norm(x), "the output of 'norm' is added to it"),
    (lambda net, x: net.norm(net.norm(x)), "'norm' normalizes what 'norm' has normalized"),
    (lambda net, x: F.linear(x, net.writer.weight @ net.head.weight), "multiplied by a weight that is no parameter"),
    (lambda net, x: x.masked_fill(torch.ones(2, 6, 1, dtype=torch.bool), 2.0), "masked_fill takes its features apart"),
])  # fmt: skip
def test_operations_that_need_the_basis_as_it_is(operation, reason):
    assert reason in stream(Net(operation)).fixed


@pytest.mark.parametrize(("module", "centered", "offset"), [
    (nn.RMSNorm(8), False, 0), (nn.LayerNorm(8), True, 0), (nn.LayerNorm(8, bias=False), True, 0),
    (nn.LayerNorm(8, elementwise_affine=False), True, 0),
])  # fmt: skip
def test_norms_are_recognized(module, centered, offset):
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    norm = recognize("n", module, 8, torch.device("cpu"))
    assert norm is not None
    assert (norm.centered, norm.offset) == (centered, offset)
    assert (norm.gain is not None) == (getattr(module, "weight", None) is not None)
    assert (norm.bias is not None) == (getattr(module, "bias", None) is not None)


def test_the_norm_of_gemma_has_an_offset():
    model = build("gemma")
    norm = recognize("n", model.model.norm, 32, torch.device("cpu"))
    assert norm is not None
    assert norm.offset == 1


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))

    def forward(self, x):
        return x * self.weight


@pytest.mark.parametrize("module", [Scale(), nn.Identity(), nn.Linear(8, 8), nn.PReLU(8), nn.BatchNorm1d(4).eval()])
def test_what_is_no_norm_is_not_taken_for_one(module):
    assert recognize("n", module, 8, torch.device("cpu")) is None
