"""AWQ on models: ratio 0 is rounding to nearest, the best ratio is better on held-out data."""

import copy
import gc
import math
import weakref

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lightning_compress import AWQModifier, GPTQModifier, QuantizationModifier, compress
from lightning_compress.calibration.gradient_survey import sampled_loss
from lightning_compress.layerwise import token_weights
from lightning_compress.modifiers.smoothing import awq
from lightning_compress.modifiers.smoothing.awq_scales import awq_scale, grid, group_sizes, rounded_with
from tests.support.quantization_runs import int4
from tests.support.smoothing_models import FF, NAMES, C, Plain, batches, build, change, ignore, output, planted, targets


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def scheme(name, bits=4, group=8):
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}
    return {"config_groups": {"all": {"targets": targets(name), "weights": weights}}}


def run(model, name, modifiers, data=None, **arguments):
    return compress(model, modifiers, batches(name) if data is None else data, **arguments)


@pytest.mark.parametrize("name", NAMES)
def test_without_quantizing_the_model_computes_the_same(name):
    model = planted(build(name), batches(name)[0])
    dense = copy.deepcopy(model)
    ledger = run(model, name, AWQModifier(**scheme(name, 3), ignore=ignore(model), quantize=False, n_grid=6))
    assert change(model, dense, batches(name, seed=5)) < 1e-5
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), dense.parameters(), strict=True))
    assert {row.technique for row in ledger} == {"awq"}


@pytest.mark.parametrize("name", ["llama", "gpt2", "relu", "mixtral"])
def test_ratio_0_is_rounding_to_nearest_bit_for_bit(name):
    dense = build(name)
    awq, plain = copy.deepcopy(dense), copy.deepcopy(dense)
    run(awq, name, AWQModifier(**scheme(name), ignore=ignore(dense), n_grid=1))
    run(plain, name, QuantizationModifier(**scheme(name), ignore=ignore(dense)))
    assert all(torch.equal(p, q) for p, q in zip(awq.parameters(), plain.parameters(), strict=True))
    assert any(not torch.equal(p, q) for p, q in zip(awq.parameters(), dense.parameters(), strict=True))


@pytest.mark.parametrize(("name", "bits", "arguments"), [
    ("llama", 4, {}),
    ("llama", 3, {}),
    ("llama", 3, {"duo_scaling": False}),
    ("llama", 3, {"loss": "layer"}),
    ("llama", 4, {"clip": True}),
    ("opt", 3, {"clip": True, "loss": "layer"}),
    ("mixture", 4, {}),
    ("mixtral", 4, {"objective": "loss"}),
    ("gpt2", 4, {}),
], ids=str)  # fmt: skip
def test_better_than_rounding_on_held_out_data(name, bits, arguments):
    data, held_out = batches(name), batches(name, count=4, seed=9)
    dense = planted(build(name), data[0], factor=8)
    awq, plain = copy.deepcopy(dense), copy.deepcopy(dense)
    setting = {**scheme(name, bits), "ignore": ignore(dense)}
    run(awq, name, AWQModifier(**setting, **arguments), data)
    run(plain, name, QuantizationModifier(**setting), data)
    assert change(awq, dense, held_out) < 0.9 * change(plain, dense, held_out)


def test_the_best_point_is_the_best_of_the_grid():
    """An MLP as the parent, every point tried by hand."""
    data = batches("llama")
    model = planted(build("llama"), data[0], factor=8)
    dense = copy.deepcopy(model)
    run(model, "llama", AWQModifier(**scheme("llama", 3), ignore=["lm_head"], quantize=False, n_grid=7), data)
    layer, before = model.model.layers[0], dense.model.layers[0]
    inputs = []
    handle = before.mlp.register_forward_pre_hook(lambda _m, args: inputs.append(args[0].detach()))
    masks = [batch["attention_mask"].bool() for batch in data]
    for batch in data:
        output(dense, batch)
    handle.remove()
    x = torch.cat([x[m] for x, m in zip(inputs, masks, strict=True)])
    grid_args = int4(num_bits=3, group_size=8)
    W = {name: before.mlp.get_submodule(name).weight.detach().clone() for name in ("gate_proj", "up_proj")}
    w = torch.stack([group_sizes(v, grid_args) for v in W.values()]).mean(0)
    errors, scales = [], [awq_scale(x.abs().mean(0), w, point) for point in grid(7, True)]
    for s in scales:
        trial = copy.deepcopy(before.mlp)
        for name, weight in W.items():
            trial.get_submodule(name).weight.data = rounded_with(weight, s, grid_args)
        with torch.no_grad():
            errors.append(float((trial(x) - before.mlp(x)).square().mean()))
    s = before.post_attention_layernorm.weight / layer.post_attention_layernorm.weight
    assert_close(s, scales[errors.index(min(errors))], rtol=1e-3, atol=1e-4)


def test_by_the_loss_errors_are_those_of_weighed_tokens(monkeypatch):
    """An MLP as the parent: its gradient by autograd, at zeros that are added to its output; errors by hand."""
    data = batches("llama")
    model = planted(build("llama"), data[0], factor=8)
    dense, searches, search = copy.deepcopy(model), {}, AWQModifier._parent_errors

    def recorded(self, s_KC, calls, team):
        errors = search(self, s_KC, calls, team)
        searches.update({name: (s, errors) for name, s in s_KC.items()})
        return errors

    monkeypatch.setattr(AWQModifier, "_parent_errors", recorded)
    by_loss = AWQModifier(**scheme("llama", 3), ignore=["lm_head"], quantize=False, n_grid=4, objective="loss")
    run(model, "llama", by_loss, data)
    mlp, inputs, zeros = dense.model.layers[0].mlp, [], []

    def output_with_zeros(_module, args, value):
        inputs.append(args[0].detach())
        zeros.append(torch.zeros_like(value).requires_grad_())
        return value + zeros[-1]

    handle = mlp.register_forward_hook(output_with_zeros)
    masks = [batch["attention_mask"].bool() for batch in data]
    for number, (batch, mask) in enumerate(zip(data, masks, strict=True)):
        sampled_loss(dense(**batch), "classes", mask, number).backward()
    handle.remove()
    x = torch.cat([x[m] for x, m in zip(inputs, masks, strict=True)])
    weight = torch.cat([z.grad[m].square().sum(-1) for z, m in zip(zeros, masks, strict=True)])
    scales, errors = searches["model.layers.0.mlp.up_proj"]
    assert sum(map(math.isfinite, errors)) >= 3
    for s, error in zip(scales, errors, strict=True):
        trial = copy.deepcopy(mlp)
        for layer in (trial.gate_proj, trial.up_proj):
            layer.weight.data = rounded_with(layer.weight.data, s, int4(num_bits=3, group_size=8))
        with torch.no_grad():
            each = (trial(x) - mlp(x)).square().sum(-1)
        by_hand = float((each * weight / weight.mean()).sum())
        assert error == math.inf or error == pytest.approx(by_hand, rel=1e-4)


@pytest.mark.parametrize("arguments", [{}, {"loss": "layer", "clip": True}], ids=str)
def test_equal_weights_of_tokens_change_no_bit(monkeypatch, arguments):
    dense = planted(build("llama"), batches("llama")[0], factor=8)
    models = [copy.deepcopy(dense) for _ in range(3)]

    def by(objective, model):
        run(model, "llama", AWQModifier(**scheme("llama", 3), ignore=["lm_head"], objective=objective, **arguments))

    by("layer", models[0])
    by("loss", models[1])
    energies = token_weights.energies
    monkeypatch.setattr(token_weights, "energies", lambda *call: torch.ones_like(energies(*call)))
    by("loss", models[2])
    plain, weighed, equal = (model.state_dict() for model in models)
    assert all(torch.equal(plain[name], equal[name]) for name in plain)
    assert not all(torch.equal(plain[name], weighed[name]) for name in plain)


def test_a_later_modifier_quantizes():
    data = batches("llama")
    dense = planted(build("llama"), data[0], factor=8)
    model = copy.deepcopy(dense)
    setting = {**scheme("llama", 3), "ignore": ["lm_head"]}
    ledger = run(model, "llama", [AWQModifier(**setting, quantize=False), GPTQModifier(**setting)], data)
    rows = {row.technique: row for row in ledger}
    assert set(rows) == {"awq", "gptq"}
    assert rows["gptq"].bits is not None
    assert rows["awq"].bits is None
    gptq = copy.deepcopy(dense)
    run(gptq, "llama", GPTQModifier(**setting), data)
    held_out = batches("llama", count=4, seed=9)
    assert change(model, dense, held_out) < 1.1 * change(gptq, dense, held_out)
    with pytest.raises(ValueError, match="two modifiers of the recipe quantize"):
        run(copy.deepcopy(dense), "llama", [AWQModifier(**setting), GPTQModifier(**setting)], data)


def test_the_calls_of_one_block_are_in_memory(monkeypatch):
    """The calls recorded for a block are deleted before the next block is searched."""
    alive, counts = weakref.WeakSet(), []
    record_calls = awq.record_calls

    def counted(*arguments):
        gc.collect()
        counts.append(len(alive))
        recorded = record_calls(*arguments)
        alive.update(tensor for calls in recorded.values() for tensor in calls.outputs)
        assert alive
        return recorded

    monkeypatch.setattr(awq, "record_calls", counted)
    run(build("llama"), "llama", AWQModifier(**scheme("llama"), ignore=["lm_head"], n_grid=3), batches("llama"))
    assert counts == [0, 0]


def test_the_walk_goes_on_with_rounded_weights():
    """The second block's statistics come from the first one as it is afterwards."""
    data = batches("relu")
    together, apart = build("relu"), build("relu")
    run(together, "relu", AWQModifier(**scheme("relu")), data)
    compress(apart[0], AWQModifier(**scheme("relu")), data)
    compress(apart[1], AWQModifier(**scheme("relu")), [output(apart[0], x) for x in data])
    for p, q in zip(together.parameters(), apart.parameters(), strict=True):
        assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_padding_counts_for_nothing():
    data = batches("llama")
    padded = copy.deepcopy(data)
    padded[1]["input_ids"][0, :3] = 40  # behind the mask
    models = [build("llama"), build("llama")]
    for model, batch in zip(models, (data, padded), strict=True):
        run(model, "llama", AWQModifier(**scheme("llama"), ignore=["lm_head"], n_grid=5), batch)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_layers_without_a_pair_are_rounded_and_named():
    model = nn.Sequential(nn.Linear(C, C), nn.GELU(), nn.Linear(C, C))
    with pytest.warns(UserWarning, match="AWQModifier found no smoothing pair"):
        ledger = run(model, "flat", AWQModifier(**scheme("flat")))
    assert [row.flags for row in ledger] == [["no smoothing pair; rounded to nearest"]] * 2
    assert all(row.bits for row in ledger)


@pytest.mark.filterwarnings("ignore:the first batch does not reach")
def test_layers_that_never_saw_data():
    model = nn.Sequential(Plain(nn.GELU()), Plain(nn.GELU()))
    model[0].spare = nn.Linear(C, C)
    with pytest.warns(UserWarning, match="0.spare never saw data and were rounded to nearest"):
        compress(model, AWQModifier(**scheme("gelu")), batches("gelu"))
    model = nn.Sequential(Plain(nn.GELU()), Plain(nn.GELU()))
    model[0].spare = nn.Linear(C, C)
    before = model[0].spare.weight.clone()
    with pytest.warns(UserWarning, match="0.spare never saw data and were left as they were"):
        compress(model, AWQModifier(**scheme("gelu"), quantize=False), batches("gelu"))
    assert torch.equal(before, model[0].spare.weight)


class Split(nn.Module):
    """One norm, two layers: only the model holds both."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(C), nn.Linear(C, FF), nn.Linear(C, FF)

    def forward(self, x):
        h = self.norm(x)
        return self.a(h) * torch.sigmoid(self.b(h))


def test_an_awq_target_without_a_parent():
    by_hand = [[["a", "b"], "norm"]]
    with pytest.raises(ValueError, match="AWQ target without a parent: .*'a', 'b'.*'norm' feeds.*loss='layer'"):
        compress(Split(), AWQModifier(**scheme("flat"), mappings=by_hand), batches("flat"))
    models = [Split() for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    compress(models[0], AWQModifier(**scheme("flat"), mappings=by_hand, loss="layer"), batches("flat"))
    compress(models[1], AWQModifier(**scheme("flat")), batches("flat"))  # without mappings: measured layer by layer
    compress(models[2], QuantizationModifier(**scheme("flat")), batches("flat"))
    assert torch.equal(models[0].a.weight, models[1].a.weight)
    assert not torch.equal(models[0].a.weight, models[2].a.weight)


@pytest.mark.parametrize("rows", [1, 3, 64, 66])
def test_layers_of_any_height(rows):
    """The exact error of a layer: all of its rows, or rung by rung; the winner is no worse than rounding."""
    model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, rows))
    model[1].weight.data[3] = 20
    dense, data = copy.deepcopy(model), [torch.randn(40, 16) for _ in range(3)]
    plain = copy.deepcopy(model)
    weights = {"num_bits": 3, "type": "int", "strategy": "group", "group_size": 8}
    setting = {"config_groups": {"all": {"targets": ["2"], "weights": weights}}}
    compress(model, AWQModifier(**setting), data)
    compress(plain, QuantizationModifier(**setting), data)
    error = [float(sum((net(x) - dense(x)).square().sum() for x in data)) for net in (model, plain)]
    assert error[0] <= error[1] * (1 + 1e-5)


@pytest.mark.parametrize(("arguments", "message"), [
    ({}, "expected either scheme"),
    ({"scheme": "W4A16", "n_grid": 0}, "n_grid=0"),
    ({"scheme": "W4A16", "ngrid": 5}, "did you mean 'n_grid'"),
    ({"scheme": "FP8"}, "static activations cannot be calibrated before the scales are folded; set quantize=False"),
    ({"scheme": "W4A16", "loss": "block"}, "loss='block'"),
    ({"scheme": "W4A16", "mappings": []}, "mappings is empty"),
])  # fmt: skip
def test_arguments_that_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        AWQModifier(**arguments)


def test_errors_before_any_data_is_read():
    model = build("gelu")
    with pytest.raises(ValueError, match="group_size=128 is larger than the input columns"):
        run(model, "gelu", AWQModifier(scheme="W4A16"))
    with pytest.raises(ValueError, match="needs calibration data"):
        compress(model, AWQModifier(**scheme("gelu")))
    with pytest.raises(ValueError, match=r"mappings\[0\]: 'fc9' matches none"):
        run(model, "gelu", AWQModifier(**scheme("gelu"), mappings=[["fc9", "re:.*norm"]]))


def test_an_output_that_is_not_finite_after_rounding_is_an_error():
    """All values are finite until the first weight is rounded to 1."""

    class Fragile(Split):
        def forward(self, x):
            return super().forward(x) * torch.where(self.a.weight[0, 0] == 1, torch.inf, 1.0)

    model = nn.Sequential(nn.Sequential(Fragile(), nn.Linear(FF, C)), nn.Sequential(Split(), nn.Linear(FF, C)))
    model[0][0].a.weight.data[0, :8] = torch.tensor([0.95, 7.5, -7.5, 1.0, 1.0, 1.0, 1.0, 1.0])  # scale 1
    with pytest.raises(ValueError, match="NaN or Inf in what '0.0.a', '0.0.b' lead to once they are rounded"):
        compress(model, AWQModifier(**scheme("flat")), batches("flat"), blocks=["0", "1"])
