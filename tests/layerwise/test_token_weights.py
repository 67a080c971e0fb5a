"""Weights of tokens against gradients that autograd gives for the outputs themselves, and the H that they make."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_compress import GPTQModifier, QuantizationModifier, SparseGPTModifier, WandaPruningModifier, compress
from lightning_compress.calibration.gradient_survey import sampled_loss
from lightning_compress.layerwise.input_hessian import InputHessian
from lightning_compress.layerwise.token_weights import UNSHARDED
from lightning_compress.modifiers.wanda import modifier as wanda_module
from tests.modifiers.tune.test_modifier import W2, ids, llama

SCHEME = {"num_bits": 3, "type": "int", "symmetric": True, "strategy": "channel"}
SEARCHES = ("imatrix", "hessian")
LINEARS = {"config_groups": {"g": {"targets": ["Linear"], "weights": SCHEME}}}


class Classifier(nn.Module):
    """Two layers that share an input, one convolution, one layer after them."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv1d(4, 6, 3, padding=1)
        self.q, self.k, self.head = nn.Linear(6, 8), nn.Linear(6, 5), nn.Linear(13, 7)

    def forward(self, x):
        hidden = self.convolution(x).mT.tanh()
        return self.head(torch.cat([self.q(hidden), self.k(hidden)], -1).tanh())


def batches(count=3):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, 4, 10, generator=generator) * (1 + i) for i in range(count)]


def expected(model, data, kind):
    """For each layer sum_t w_t x_t x_t^T / N, gradients taken for zeros that are added to its outputs."""
    weights, inputs = {}, {}
    groups = {"convolution": ["convolution"], "q": ["q", "k"], "k": ["q", "k"], "head": ["head"]}
    for number, x in enumerate(data):
        hidden_in = F.unfold(x[:, :, None], (1, 3), padding=(0, 1)).mT.reshape(-1, 12)
        zeros = {n: torch.zeros(2, 10, getattr(model, n).weight.shape[0], requires_grad=True) for n in groups}
        hidden = (model.convolution(x).mT + zeros["convolution"]).tanh()
        both = torch.cat([model.q(hidden) + zeros["q"], model.k(hidden) + zeros["k"]], -1).tanh()
        output = model.head(both) + zeros["head"]
        sampled_loss(output, kind, None, number).backward()
        for name, members in groups.items():
            weights.setdefault(name, []).append(sum(zeros[m].grad.square().sum(-1) for m in members).flatten())
        for name, value in (("convolution", hidden_in), ("q", hidden), ("k", hidden), ("head", both)):
            inputs.setdefault(name, []).append(value.detach().flatten(0, -2))
    hessians = {}
    for name in groups:
        w, X = torch.cat(weights[name]).double(), torch.cat(inputs[name]).double()
        hessians[name] = (X.t() * (w / w.mean())) @ X / len(X)
    return hessians


@pytest.mark.parametrize("objective", ["loss", "output"])
def test_hessians_are_those_of_weighed_tokens(monkeypatch, objective):
    """The first layers of the walk see dense inputs, so that H is known without compression."""
    torch.manual_seed(0)
    model, seen = Classifier(), {}
    reference = copy.deepcopy(model)
    take = GPTQModifier.prepare

    def prepare(self, hessian, layers):
        seen.update({layer.name: hessian.H_CC.clone() for layer in layers})
        return take(self, hessian, layers)

    monkeypatch.setattr(GPTQModifier, "prepare", prepare)
    groups = {"g": {"targets": ["Linear", "Conv1d"], "weights": SCHEME}}
    compress(model, GPTQModifier(config_groups=groups, objective=objective), batches(), walk="whole")
    hessians = expected(reference, batches(), {"loss": "classes", "output": "values"}[objective])
    assert seen.keys() == {"convolution", "q", "k", "head"}
    for name, H_CC in seen.items():
        torch.testing.assert_close(H_CC.double(), hessians[name], rtol=1e-4, atol=1e-6)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_scale_search_and_wanda_take_weighed_tokens(monkeypatch):
    """Of RTN the importance of columns or the blocks of H, of Wanda the norms of inputs."""
    torch.manual_seed(0)
    model, seen = Classifier(), {}
    expected_H = expected(copy.deepcopy(model), batches(), "classes")
    round_, mask = QuantizationModifier.round, wanda_module.wanda_mask

    def rounded(self, state, name, *args, **weights):
        seen[name] = next(iter(weights.values()))
        round_(self, state, name, *args, **weights)

    monkeypatch.setattr(QuantizationModifier, "round", rounded)
    rtn = {scale: QuantizationModifier(**LINEARS, scale_search=scale, objective="loss") for scale in SEARCHES}
    compress(copy.deepcopy(model), rtn["imatrix"], batches(), walk="whole")
    for name in ("q", "k", "head"):
        torch.testing.assert_close(seen[name][0].double(), expected_H[name].diagonal(), rtol=1e-4, atol=1e-6)
    compress(copy.deepcopy(model), rtn["hessian"], batches(), walk="whole")
    for name in ("q", "k", "head"):
        torch.testing.assert_close(seen[name][0, 0].double(), expected_H[name], rtol=1e-4, atol=1e-6)
    norms = []
    monkeypatch.setattr(wanda_module, "wanda_mask", lambda W, norm, *a: norms.append(norm) or mask(W, norm, *a))
    compress(copy.deepcopy(model), WandaPruningModifier(objective="loss"), batches(), walk="whole")
    for name, norm in zip(("q", "k", "head"), norms, strict=True):
        torch.testing.assert_close(norm.square().double(), expected_H[name].diagonal(), rtol=1e-4, atol=1e-6)


def test_layers_before_an_inplace_activation():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 5))
    ledger = compress(model, GPTQModifier(**LINEARS, objective="loss"), [torch.randn(9, 6) for _ in range(2)])
    assert [row.tokens for row in ledger.rows] == [18, 18]


def test_what_the_function_that_runs_the_model_returns_does_not_matter():
    """As a calibration_step, which needs no result: the gradients are those of the model's own output."""

    def forward(model, batch):
        model(batch)

    weights = []
    for arguments in ({}, {"forward": forward}):
        torch.manual_seed(0)
        model = Classifier()
        compress(model, GPTQModifier(objective="loss", **LINEARS), batches(), **arguments)
        weights.append(model.q.weight.detach().clone())
    assert torch.equal(*weights)


def test_layers_of_one_input_share_one_hessian(monkeypatch):
    updates = []
    update = InputHessian.update
    monkeypatch.setattr(InputHessian, "update", lambda self, X: updates.append(X.shape) or update(self, X))
    compress(Classifier(), GPTQModifier(**LINEARS, objective="loss"), batches(), walk="whole")
    assert len(updates) == 2 * 3  # q and k together, and the head


def test_padding_has_no_weight():
    """Neither the mean of the weights nor H depends on what stands in the padding."""

    def padded(filler):
        made = []
        for batch in ids(4):
            mask = torch.ones_like(batch["input_ids"])
            mask[1:, 13:] = 0
            made.append({"input_ids": torch.where(mask.bool(), batch["input_ids"], filler), "attention_mask": mask})
        return made

    weights = []
    for filler in (3, 40):
        model = llama()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compress(model, GPTQModifier(**W2, objective="loss"), padded(filler))
        weights.append(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*[w.values() for w in weights], strict=True))


@pytest.mark.parametrize("make", [
    lambda objective: GPTQModifier(**W2, objective=objective),
    lambda objective: SparseGPTModifier(sparsity=0.6, ignore=["lm_head"], objective=objective),
    lambda objective: SparseGPTModifier(sparsity=0.6, ignore=["lm_head"], objective=objective, sparsity_profile="owl"),
], ids=["gptq", "sparsegpt", "owl"])  # fmt: skip
def test_one_pass_and_two_use_the_weights(make):
    ends = {}
    for objective in ("layer", "loss"):
        model = llama()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ledger = compress(model, make(objective), ids(), walk="two_pass")
        ends[objective] = model.model.layers[0].self_attn.q_proj.weight.detach()
        assert {row.tokens for row in ledger.rows} == {768}
        assert all(0 <= row.error < 2 for row in ledger.rows)
    assert not torch.equal(*ends.values())


def test_what_it_refuses():
    pruner = SparseGPTModifier(sparsity=0.5, ignore=["lm_head"], objective="loss")
    with pytest.raises(
        ValueError, match="SparseGPTModifier those of classes and GPTQModifier those of values are asked"
    ):
        compress(llama(), [pruner, GPTQModifier(**W2, objective="output")], ids())
    net = nn.Sequential(nn.Linear(8, 8))
    net.forward = lambda x: {"embedding": net[0](x)}
    with pytest.raises(ValueError, match="found no logits in an output of type dict"):
        compress(net, GPTQModifier(**LINEARS, objective="loss"), [torch.randn(9, 8)])
    with pytest.raises(ValueError, match="objective='loss' weighs the inputs of layers, which scale_search='minmax'"):
        QuantizationModifier(**W2, objective="loss")
    with pytest.raises(ValueError, match="GPTQModifier: objective='training_step' takes the loss of a LightningModule"):
        compress(llama(), GPTQModifier(**W2, objective="training_step"), ids())
    with pytest.raises(ValueError, match="in no calibration batch did the loss have a gradient"):
        compress(llama(), GPTQModifier(**W2, objective="training_step"), ids(), loss=lambda *arguments: None)
    with pytest.raises(ValueError, match="loss is given, and no modifier has objective='training_step'"):
        compress(llama(), GPTQModifier(**W2), ids(), loss=lambda model, batch: None)
    assert GPTQModifier(**W2, objective="loss").needs.sharded == UNSHARDED
    assert GPTQModifier(**W2).needs.sharded is True
