"""QAT by hand: what is trained is what is left behind, for every grid; keys, scales, windows, and bad input."""

import copy
import warnings
from itertools import pairwise

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from lightning_compress import (
    GPTQModifier,
    MagnitudePruningModifier,
    QATModifier,
    QuantizationModifier,
    compress,
    load,
    save,
)
from lightning_compress.calibration import calibrate
from lightning_compress.core import Event, EventType, Lifecycle, State
from lightning_compress.layers.matrix import as_matrix
from lightning_compress.modifiers.constant import ConstantPruningModifier
from lightning_compress.quant.parametrization import fake_quantize_of
from lightning_compress.quant.record import Quantized
from tests.support.training_loop import network, train

X = torch.randn(8, 16, generator=torch.Generator().manual_seed(5))
STATIC = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}


def weights(bits=4, symmetric=True, grain="group", kind="int", inputs=None):
    grid = {"num_bits": bits, "type": kind, "symmetric": symmetric, "strategy": grain}
    grid |= {"group_size": 8} if grain == "group" else {}
    return {"config_groups": {"g": {"targets": ["Linear"], "weights": grid, "input_activations": inputs}}}


def trained(modifier, steps=4, model=None, **options):
    """The model after some steps, still parametrized; the optimizer comes after INITIALIZE, as it does in a Trainer."""
    model = network() if model is None else model
    lifecycle = Lifecycle(modifier if isinstance(modifier, list) else [modifier])
    lifecycle.initialize(State(model=model))
    return model, train(model, [], steps, lifecycle=lifecycle, **options)


def finished(model, lifecycle):
    """Outputs before and after the end."""
    model.eval()
    x = X.to(next(model.parameters()).dtype)
    with torch.no_grad():
        before = model(x)
        lifecycle.finalize(State(model=model))
        return before, model(x)


BLOCKS = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "block", "block_structure": [48, 48]}
NVFP4 = preset_name_to_scheme("NVFP4", ["Linear"])
GRIDS = {
    **{
        f"{bits} bit {grain}{'' if symmetric else ' asym'}": weights(bits, symmetric, grain)
        for bits, grain in ((2, "group"), (3, "channel"), (4, "group"), (5, "tensor"), (6, "channel"), (8, "channel"))
        for symmetric in (True, False)
    },
    "7 bit": weights(7),
    "fp8": weights(8, grain="channel", kind="float"),
    "fp8 tensor": weights(8, grain="tensor", kind="float"),
    "dynamic": {"scheme": "W8A8"},
    "fp8 dynamic": {"scheme": "FP8_DYNAMIC"},
    "static": weights(8, grain="channel", inputs=STATIC),
    "static asym": weights(8, grain="channel", inputs=STATIC | {"symmetric": False}),
    "fp8 static": {"scheme": "FP8"},
    "fp8 blocks": {"config_groups": {"g": {"targets": ["Linear"], "weights": BLOCKS}}},
    "nvfp4": {"config_groups": {"g": {"targets": ["Linear"], "weights": NVFP4.weights.model_dump()}}},
    "nvfp4 static": {"config_groups": {"g": NVFP4}},
}


@pytest.mark.parametrize("gradient", ["lsq", "ste"])
@pytest.mark.parametrize("name", GRIDS)
def test_what_was_trained_is_what_is_left(name, gradient):
    model, lifecycle = trained(QATModifier(**GRIDS[name], gradient=gradient, averaging_constant=0.5))
    before, after = finished(model, lifecycle)
    assert torch.equal(before, after)
    assert list(Quantized.find(model)) == ["0", "2"]
    again = network()
    again.load_state_dict(model.state_dict())
    assert type(model[0]) is nn.Linear
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in again.named_parameters()]


def deep_network(dtype=torch.float32):
    """Its layer "2" has groups of 16, 32 and 128 columns, and its last blocks of 48 x 48 are not full."""
    torch.manual_seed(0)
    layers = (nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 40), nn.ReLU(), nn.Linear(40, 8))
    return nn.Sequential(*layers).to(dtype)


FORMATS = ["NVFP4A16", "NVFP4", "MXFP4A16", "MXFP4", "MXFP4XFP8", "MXFP6A8", "MXFP8", "FP8_BLOCK", {"weights": BLOCKS}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gradient", ["lsq", "ste"])
@pytest.mark.parametrize("scheme", FORMATS, ids=lambda scheme: scheme if isinstance(scheme, str) else "blocks of 48")
def test_what_was_trained_in_a_format_of_its_own_is_what_a_reader_computes(scheme, gradient, dtype, tmp_path):
    modifier = QATModifier(scheme=scheme, targets=["2"], gradient=gradient, averaging_constant=0.5)
    model = deep_network()
    lifecycle = Lifecycle([modifier])
    lifecycle.initialize(State(model=model))
    model.to(dtype)  # as the Trainer does after INITIALIZE
    model[0].register_forward_pre_hook(lambda layer, x: (x[0].to(dtype),))
    train(model, [], 4, lifecycle=lifecycle)
    dense = copy.deepcopy(model[2].parametrizations.weight.original)
    before, after = finished(model, lifecycle)
    assert torch.equal(before, after)
    assert not torch.equal(model[2].weight, dense)
    save(model, tmp_path)
    loaded = load(tmp_path, deep_network(dtype), packed=False)
    with torch.no_grad():
        assert torch.equal(loaded(X.to(dtype)), after)


@pytest.mark.parametrize("gradient", ["lsq", "ste"])
@pytest.mark.parametrize("scheme", ["NVFP4A16", "MXFP4A16", "MXFP6A16", "MXFP8A16", "FP8_DYNAMIC"])
def test_training_begins_at_rounding_to_nearest(scheme, gradient):
    rounded, model = deep_network(), deep_network()
    compress(rounded, QuantizationModifier(scheme=scheme, targets=["2"]))
    trained(QATModifier(scheme=scheme, targets=["2"], gradient=gradient), steps=0, model=model)
    assert torch.equal(model[2].weight, rounded[2].weight)
    record = fake_quantize_of(model[2]).record(model[2].parametrizations.weight.original.detach())
    assert torch.equal(record.scale, Quantized.of(rounded[2]).scale)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.out = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, x):
        return self.out(self.q_proj(x) * self.k_proj(x))


@pytest.mark.parametrize("gradient", ["lsq", "ste"])
def test_weights_that_servers_fuse_share_a_global_scale_that_follows_the_largest(gradient):
    torch.manual_seed(0)
    model = Attention()
    with torch.no_grad():
        model.q_proj.weight *= 3
    modifier = QATModifier(scheme="NVFP4A16", gradient=gradient)
    _, lifecycle = trained(modifier, 0, model)
    q, k, out = (fake_quantize_of(layer) for layer in (model.q_proj, model.k_proj, model.out))
    first = q.global_scale.clone()
    assert torch.equal(first, k.global_scale)
    assert first < out.global_scale  # alone
    before = k(model.k_proj.parametrizations.weight.original.detach())
    with torch.no_grad():
        model.q_proj.parametrizations.weight.original *= 5
        if q.change is not None:
            q.change.fill_(4)
    train(model, [], 1, lifecycle=lifecycle, optimizer=torch.optim.SGD(model.parameters(), lr=0.0))
    assert torch.equal(q.global_scale, first / 8)  # the weight outgrew it fivefold
    assert torch.equal(k.global_scale, first / 8)
    assert torch.equal(k(model.k_proj.parametrizations.weight.original.detach()), before)
    finished(model, lifecycle)
    records = [Quantized.of(layer) for layer in (model.q_proj, model.k_proj)]
    assert torch.equal(records[0].global_scale, records[1].global_scale)
    assert (records[0].scale * records[0].global_scale).amax() <= 448


@pytest.mark.parametrize("layer", ["conv1d", "conv2d", "grouped", "transposed"])
def test_other_layers(layer):
    torch.manual_seed(0)
    module, x = {
        "conv1d": (nn.Conv1d(4, 8, 2), torch.randn(2, 4, 6)),
        "conv2d": (nn.Conv2d(4, 8, 2), torch.randn(2, 4, 5, 5)),
        "grouped": (nn.Conv2d(4, 8, 2, groups=2), torch.randn(2, 4, 5, 5)),
        "transposed": (Conv1D(8, 16), torch.randn(2, 16)),
    }[layer]
    model = nn.Sequential(module)
    groups = {"g": weights(3)["config_groups"]["g"] | {"targets": [type(module).__name__]}}
    lifecycle = Lifecycle([QATModifier(config_groups=groups)])
    lifecycle.initialize(State(model=model))
    y = model(x)
    y.square().sum().backward()
    assert module.parametrizations.weight.original.grad.abs().sum() > 0
    lifecycle.finalize(State(model=model))
    assert torch.equal(model(x), y)


# -- keys -------------------------------------------------------------------------------------------------------------


def test_keys_are_the_dense_ones():
    dense = network()
    model, _ = trained(QATModifier(scheme="W4A16", group_size=8))
    state = model.state_dict()
    assert list(state) == list(dense.state_dict())
    assert state._metadata.keys() == dense.state_dict()._metadata.keys()
    dense.load_state_dict(state)
    assert torch.equal(dense[0].weight, model[0].parametrizations.weight.original)


def test_dense_keys_load_and_scales_follow_them():
    model, _ = trained(QATModifier(scheme="W4A16", group_size=8))
    other = network(seed=7)
    model.load_state_dict(other.state_dict())
    rounded = network(seed=7)
    compress(rounded, QuantizationModifier(scheme="W4A16", group_size=8))
    assert torch.equal(model(X), rounded(X))
    with pytest.raises(RuntimeError, match="size mismatch for 0"):
        model.load_state_dict({**other.state_dict(), "0.weight": torch.zeros(3, 3)})
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({"0.bias": torch.zeros(32)})


def test_a_copy_is_a_model_of_its_own():
    model, lifecycle = trained(QATModifier(scheme="W8A8"))
    twin = copy.deepcopy(model)
    assert torch.equal(twin(X), model(X))
    twin.load_state_dict(network(seed=7).state_dict())
    assert list(twin.state_dict()) == list(model.state_dict())
    assert not torch.equal(twin(X), model(X))
    finished(model, lifecycle)
    assert fake_quantize_of(twin[0]) is not None


# -- scales -----------------------------------------------------------------------------------------------------------


def test_scales_that_follow_the_weight_stop_at_observe_until():
    seen = []
    model = network()
    modifier = QATModifier(scheme="W4A16", group_size=8, gradient="ste", observe_until=3)

    def note(step):
        fake = fake_quantize_of(model[0])
        seen.append(fake.grid(model[0].parametrizations.weight.original.detach())[0].clone())

    trained(modifier, 6, model, after_step=note)
    moved = [not torch.equal(a, b) for a, b in pairwise(seen)]
    assert moved == [True, True, False, False, False]


def test_learned_scales_move_until_the_end_of_the_window():
    seen = []
    model = network()
    modifier = QATModifier(scheme="W4A16", group_size=8, end=3)

    def note(step):
        fake = fake_quantize_of(model[0])
        seen.append(fake.grid(model[0].parametrizations.weight.original.detach())[0].clone())

    trained(modifier, 6, model, after_step=note)
    moved = [not torch.equal(a, b) for a, b in pairwise(seen)]
    assert moved == [True, True, False, False, False]
    assert model[0].parametrizations.weight[0].change.grad.abs().max() == 0  # a gradient, for DDP, but zero


def test_before_the_start_the_model_trains_as_it_is():
    modifier = QATModifier(scheme="W8A8", start=4)
    model, _ = trained(modifier, steps=4)
    plain = network()
    train(plain, [QATModifier(scheme="W8A8", targets=["2"], start=100)], 4)
    assert torch.equal(model(X), plain(X))
    assert model[0].parametrizations.weight[0].change.abs().max() == 0
    model, lifecycle = trained(QATModifier(scheme="W3A16", group_size=8, start=3, scale_search="mse"), steps=3)
    dense = copy.deepcopy(model)
    train(model, [], 4, first=3, lifecycle=lifecycle, optimizer=torch.optim.SGD(model.parameters(), lr=0.0))
    rounded = network()
    rounded.load_state_dict(dense.state_dict())
    compress(rounded, QuantizationModifier(scheme="W3A16", group_size=8, scale_search="mse"))
    assert torch.equal(model(X), rounded(X))  # scales are those of the weights at the start, not before


def test_static_activations_average_the_extremes_of_batches_until_they_freeze():
    modifier = QATModifier(**weights(8, grain="channel", inputs=STATIC), averaging_constant=0.25, observe_until=3)
    model = network()
    seen = []
    model[0].register_forward_pre_hook(lambda m, args: seen.append(args[0].aminmax()) if m.training else None)
    lifecycle = train(model, [modifier], 5, accumulate=2)
    low, high = (float(v) for v in seen[0])
    for lowest, highest in seen[1:6]:
        low, high = low + 0.25 * (float(lowest) - low), high + 0.25 * (float(highest) - high)
    finished(model, lifecycle)
    assert_close(Quantized.of(model[0]).input_scale.item(), max(-low, high) / 127.5)


def test_a_model_in_eval_mode_is_observed_too():
    """Lightning leaves modes alone, and from_pretrained returns a model in eval mode; validation does not count."""
    model = network().eval()
    state = State(model=model)
    lifecycle = Lifecycle([QATModifier(**weights(8, grain="channel", inputs=STATIC))])
    lifecycle.initialize(state)
    lifecycle.emit(state, Event(EventType.BATCH_START))
    x = torch.randn(8, 16)
    model(x)
    with torch.no_grad():
        model(3 * x)
    lifecycle.emit(state, Event(EventType.BATCH_END))
    finished(model, lifecycle)
    assert_close(Quantized.of(model[0]).input_scale.item(), float(x.abs().max()) / 127.5)


@pytest.mark.parametrize("inputs", [STATIC, STATIC | {"symmetric": False}, STATIC | {"type": "float"}], ids=str)
def test_static_activation_scales_are_observed_then_learned_then_stand(inputs):
    kind = "float" if inputs["type"] == "float" else "int"
    groups = weights(8, grain="channel", kind=kind, inputs=inputs)
    modifier = QATModifier(**groups, averaging_constant=0.25, observe_until=2, end=5, learn_activations=True)
    model, seen = network(), []

    def note(step):
        inputs = fake_quantize_of(model[2]).input
        seen.append((inputs.grid()[0].item(), inputs.change.item()))

    _, lifecycle = trained(modifier, 7, model, after_step=note)
    scales, changes = zip(*seen, strict=True)
    assert changes[:2] == (0, 0)  # observed
    assert len(set(changes[2:5])) == 3  # learned
    assert len(set(scales[4:])) == 1  # at rest
    assert fake_quantize_of(model[2]).input.change.grad == 0  # a gradient, for DDP, but zero
    before, after = finished(model, lifecycle)
    assert torch.equal(before, after)
    assert Quantized.of(model[2]).input_scale.item() == scales[-1]
    assert list(model.state_dict()) == list(network().state_dict())


def test_static_activations_that_never_see_data_are_named():
    model = network()
    with pytest.warns(UserWarning, match="0 never saw a training batch.*static activation scale is unknown"):
        ledger = compress(model, QATModifier(**weights(8, grain="channel", inputs=STATIC)))
    assert ledger.rows[0].flags == ["never saw data; left as it was"]
    assert torch.equal(model(X), network()(X))


@pytest.mark.parametrize("layer", ["linear", "grouped conv", "transposed", "bf16", "pruned"])
@pytest.mark.parametrize("grid", ["2 bit group", "3 bit channel asym", "fp8", "5 bit tensor", "nvfp4", "fp8 blocks"])
def test_training_starts_from_what_gptq_rounded(layer, grid):
    """The first forward pass is GPTQ's model bit for bit, but the optimizer moves the values before rounding."""
    torch.manual_seed(0)
    module, shape = {
        "linear": (nn.Linear(16, 8), (64, 16)),
        "grouped conv": (nn.Conv1d(16, 8, 2, groups=2), (16, 16, 6)),
        "transposed": (Conv1D(8, 16), (64, 16)),
        "bf16": (nn.Linear(16, 8).bfloat16(), (64, 16)),
        "pruned": (nn.Linear(16, 8), (64, 16)),
    }[layer]
    x = torch.randn(shape).to(module.weight.dtype)
    if layer == "pruned":
        module.weight.data[:, ::2] = 0
    dense = as_matrix(module).clone()
    groups = {"g": GRIDS[grid]["config_groups"]["g"] | {"targets": [type(module).__name__]}}
    model = nn.Sequential(module)
    compress(model, GPTQModifier(config_groups=groups, keep_latents=True, dampening_frac=0.1), [x])
    expected, weight, keys = model(x), module.weight.clone(), list(model.state_dict())
    assert keys == ["0.weight", "0.bias"]
    lifecycle = Lifecycle([QATModifier(config_groups=groups)])
    lifecycle.initialize(State(model=model))
    assert torch.equal(model(x), expected)
    latent = module.parametrizations.weight.original.detach()
    assert (latent != weight).float().mean() > 0.3
    if layer == "pruned":
        assert (model(x) == expected).all()
        latent = latent if latent.shape == dense.shape else latent.t()
        assert (latent[:, ::2] == 0).all()
    lifecycle.finalize(State(model=model))
    assert torch.equal(module.weight, weight)
    assert Quantized.of(module).latent is None


def test_latents_stay_behind_when_the_weight_has_changed():
    model, data = network(), [torch.randn(64, 16)]
    compress(model, GPTQModifier(scheme="W3A16", group_size=8, keep_latents=True), data)
    kept = Quantized.of(model[0]).latent.clone()
    scale = Quantized.of(model[0]).scale
    with torch.no_grad():
        model[0].weight[0] -= scale[0].repeat_interleave(8)
    changed = model[0].weight.detach().clone()
    QATModifier(scheme="W3A16", group_size=8).initialize(State(model=model))
    latent = model[0].parametrizations.weight.original
    assert torch.equal(latent[1:], kept[1:])
    assert torch.equal(latent[0], changed[0])


def test_latents_are_not_exported(tmp_path):
    model, data = network(), [torch.randn(64, 16)]
    compress(model, GPTQModifier(scheme="W4A16", group_size=8, keep_latents=True), data)
    save(model, tmp_path / "out")
    names = load_file(tmp_path / "out" / "model.safetensors")
    assert {name.rpartition(".")[2] for name in names} == {"weight_packed", "weight_scale", "weight_shape", "bias"}
    assert Quantized.of(load(tmp_path / "out", network(), packed=False)[0]).latent is None


def test_training_goes_on_from_gptq():
    data = [torch.randn(64, 16, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    gptq, model = network(), network()
    compress(gptq, GPTQModifier(scheme="W3A16", group_size=8), data)
    compress(model, GPTQModifier(scheme="W3A16", group_size=8), data)
    lifecycle = Lifecycle([QATModifier(scheme="W3A16", group_size=8)])
    lifecycle.initialize(State(model=model))
    assert Quantized.find(model) == {}
    assert torch.equal(model(X), gptq(X))  # the very model that GPTQ made
    train(model, [], 3, lifecycle=lifecycle)
    before, after = finished(model, lifecycle)
    assert torch.equal(before, after)
    assert not torch.equal(after, gptq(X))


def from_gptq(start=0, bits=3, **options):
    scheme = {"scheme": f"W{bits}A16", "group_size": 8, "start": start}
    return [GPTQModifier(**scheme), QATModifier(**scheme, **options)]


def test_one_recipe_quantizes_first_and_trains_then():
    """What GPTQ alone makes of the model is where training starts; the optimizer's parameters stay the same objects."""
    data = [torch.randn(64, 16, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    expected, model = network(), network()
    compress(expected, GPTQModifier(scheme="W3A16", group_size=8, keep_latents=True), data)
    lifecycle = Lifecycle(from_gptq())
    lifecycle.initialize(State(model=model))
    before = [id(p) for p in model.parameters()]
    accumulators = [p.view_as(p).grad_fn.next_functions[0][0] for p in model.parameters()]
    assert torch.equal(model(X), network()(X))  # the dense one until then
    first = Event(EventType.BATCH_START)
    calibrate(lifecycle.handing_over(first), State(model=model), data)
    lifecycle.modifiers[0].note_handed_over()
    assert lifecycle.handing_over(first) is None
    assert [m.name for m in lifecycle.after_training.modifiers] == ["QATModifier"]
    assert [id(p) for p in model.parameters()] == before
    assert list(model.state_dict()) == list(network().state_dict())
    assert [p.view_as(p).grad_fn.next_functions[0][0] for p in model.parameters()] == accumulators  # DDP's hooks
    assert torch.equal(model(X), expected(X))
    for layer in (0, 2):
        assert torch.equal(model[layer].parametrizations.weight.original, Quantized.of(expected[layer]).latent)
    train(model, [], 3, lifecycle=lifecycle)
    assert not torch.equal(model(X), expected(X))
    before, after = finished(model, lifecycle)
    assert torch.equal(before, after)
    assert list(Quantized.find(model)) == ["0", "2"]


def test_without_training_the_recipe_is_gptq():
    data = [torch.randn(64, 16, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    expected, model = network(), network()
    compress(expected, GPTQModifier(scheme="W3A16", group_size=8), data)
    ledger = compress(model, from_gptq(), data)
    assert torch.equal(model(X), expected(X))
    assert [row.technique for row in ledger] == ["gptq", "gptq", "qat", "qat"]


@pytest.mark.parametrize(
    ("modifiers", "message"),
    [
        (
            [GPTQModifier(scheme="W4A16", group_size=8), QATModifier(scheme="W4A16", group_size=8)],
            "two modifiers.*quantize '0'.*give GPTQModifier the start of QATModifier if QATModifier must",
        ),
        (from_gptq()[::-1], "two modifiers of the recipe quantize '0', QATModifier and GPTQModifier"),
        (from_gptq()[:1], "has start=0.0, so it will quantize '0' during training.*add one, such as a QAT"),
        (
            [from_gptq()[0], QATModifier(scheme="W3A16", group_size=8, targets=["0"])],
            "GPTQModifier has start=0.0, so it will quantize '2' during training",
        ),
        (
            [from_gptq(2)[0], from_gptq(5)[1]],
            r"QATModifier continues from GPTQModifier, but has start=5.0 .unit: step., and GPTQ.* start=2.0.*give",
        ),
        (
            [from_gptq(bits=4)[0], from_gptq(bits=3)[1]],
            "which quantizes '0' as W4A16 g8 sym, but has the scheme W3A16 g8 sym; give both the same scheme",
        ),
    ],
    ids=["no start", "wrong order", "no QAT", "not all", "other start", "other scheme"],
)
def test_recipes_that_cannot_hand_over(modifiers, message):
    with pytest.raises(ValueError, match=message):
        Lifecycle(modifiers).initialize(State(model=network()))


def test_static_activation_scales_of_a_record_stay():
    data = [torch.randn(64, 16, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    groups = weights(8, grain="channel", inputs=STATIC)
    model = network()
    compress(model, QuantizationModifier(**groups), data)
    expected = model(X)
    lifecycle = Lifecycle([QATModifier(**groups)])
    lifecycle.initialize(State(model=model))
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("gradient", ["lsq", "ste"])
def test_training_beats_rounding(bits, gradient):
    """Learning a network with correlated inputs from itself: the error that rounding makes, and what is left of it."""
    mix = torch.randn(5, 16, generator=torch.Generator().manual_seed(3))

    def batch(seed, rows=64):
        return torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed)) @ mix / 5**0.5

    def error(model):
        with torch.no_grad():
            return (model(batch(10**6, 256)) - teacher(batch(10**6, 256))).square().mean().item()

    teacher, model, rounded = (network() for _ in range(3))
    compress(rounded, QuantizationModifier(scheme=f"W{bits}A16", group_size=16, scale_search="mse"))
    lifecycle = Lifecycle([QATModifier(scheme=f"W{bits}A16", group_size=16, gradient=gradient, scale_search="mse")])
    lifecycle.initialize(State(model=model))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    assert_close(error(model), error(rounded))
    for step in range(120):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 120)
        optimizer.zero_grad()
        (model(batch(step)) - teacher(batch(step)).detach()).square().mean().backward()
        optimizer.step()
    lifecycle.finalize(State(model=model))
    assert error(model) < 0.5 * error(rounded)


# -- with others ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("first", ["prune", "quantize"])
def test_pruned_zeros_are_zeros_in_the_end(first, symmetric):
    prune = MagnitudePruningModifier(start=0, end=4, final_sparsity=0.5)
    quantize = QATModifier(**weights(4, symmetric))
    model, lifecycle = trained([prune, quantize] if first == "prune" else [quantize, prune], steps=6)
    masks = prune._weights.masks
    finished(model, lifecycle)
    for name, mask in masks.items():
        weight = model.get_submodule(name).weight
        assert (weight[~mask] == 0).all()
        assert (weight == 0).float().mean() >= 0.5


def test_held_zeros_stay():
    model = network()
    with torch.no_grad():
        model[0].weight[:, ::2] = 0
    held = [ConstantPruningModifier(), QATModifier(scheme="W4A16", group_size=8)]
    finished(model, trained(held, model=model)[1])
    assert (model[0].weight[:, ::2] == 0).all()


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_another_quantizer_on_one_module_is_refused_at_setup(order):
    both = [QATModifier(scheme="W4A16", group_size=8), GPTQModifier(scheme="W8A16", group_size=8, targets=["2"])]
    lifecycle = Lifecycle([both[i] for i in order])
    with pytest.raises(ValueError, match="two modifiers of the recipe quantize '2'.*(QAT.*GPTQ|GPTQ.*QAT)Modifier"):
        lifecycle.initialize(State(model=network()))


def test_another_quantizer_on_other_modules():
    model = network()
    data = [torch.randn(64, 16, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    both = [
        QATModifier(scheme="W4A16", group_size=8, targets=["0"]),
        GPTQModifier(scheme="W8A16", group_size=8, targets=["2"]),
    ]
    ledger = compress(model, both, data)
    assert [(row.module, row.technique) for row in ledger] == [("2", "gptq"), ("0", "qat")]
    assert list(Quantized.find(model)) == ["0", "2"]


# -- BatchNorm --------------------------------------------------------------------------------------------------------


def test_batch_norm_freezes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Linear(32, 8))
    means = []
    modifier = QATModifier(scheme="W4A16", group_size=8, freeze_bn_at=2)
    train(model, [modifier], 5, after_step=lambda step: means.append(model[1].running_mean.clone()))
    same = [torch.equal(a, b) for a, b in pairwise(means)]
    assert same == [False, True, True, True]
    assert model[1].weight.grad is not None  # scale and shift train on


def test_no_batch_norm_to_freeze():
    with pytest.warns(UserWarning, match="freeze_bn_at=2.*no BatchNorm"):
        Lifecycle([QATModifier(scheme="W4A16", group_size=8, freeze_bn_at=2)]).initialize(State(model=network()))


# -- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient": "ste", "observe_until": 5},
        {"start": 2, "end": 6},
        {"start": 5},
        {"observe_until": 2, "learn_activations": True},
        {"observe_until": 6, "learn_activations": True, "end": 7},
    ],
    ids=str,
)
def test_a_resumed_run_is_the_same_run(options):
    def modifier():
        return QATModifier(**weights(8, grain="channel", inputs=STATIC), averaging_constant=0.5, **options)

    whole, _ = trained(modifier(), steps=8)
    model = network()
    lifecycle = Lifecycle([modifier()])
    lifecycle.initialize(State(model=model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.05)
    train(model, [], 4, lifecycle=lifecycle, optimizer=optimizer)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), lifecycle.state_dict()))

    again = network(seed=9)
    lifecycle = Lifecycle([modifier()])
    lifecycle.initialize(State(model=again))
    again.load_state_dict(saved[0])
    lifecycle.load_state_dict(saved[2])
    optimizer = torch.optim.SGD(again.parameters(), lr=0.1, momentum=0.9, weight_decay=0.05)
    optimizer.load_state_dict(saved[1])
    train(again, [], 8, first=4, lifecycle=lifecycle, optimizer=optimizer)
    assert torch.equal(again(X), whole(X))
    before, after = finished(again, lifecycle)
    assert torch.equal(before, after)


def test_a_run_that_never_started_leaves_the_model_as_it_is():
    model, lifecycle = trained(QATModifier(scheme="W4A16", group_size=8, start=100))
    with pytest.warns(UserWarning, match="never started"):
        before, after = finished(model, lifecycle)
    assert torch.equal(before, after)
    assert Quantized.find(model) == {}


def test_the_ledger_has_a_row_with_the_error():
    model, lifecycle = trained(QATModifier(scheme="W4A16", group_size=8))
    state = State(model=model)
    lifecycle.finalize(state)
    row = state.ledger.rows[0]
    assert (row.technique, row.scheme, row.params) == ("qat", "W4A16 g8 sym", 512)
    assert 0 < row.error < 0.05


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": None}, "start=None: quantization-aware training needs a window"),
        ({"start": 5, "observe_until": 2}, r"observe_until=2.0 lies before start=5.0 \(unit: step\)"),
        ({"start": 5, "freeze_bn_at": 2}, r"freeze_bn_at=2.0 lies before start=5.0"),
        ({"gradient": "lsw"}, "gradient='lsw'"),
        ({"learn_activations": True, "observe_until": 2}, "no scheme has static activations"),
        ({"scheme": "NVFP4", "learn_activations": True, "observe_until": 2}, "no scheme has static activations"),
        ({"scheme": "FP8", "learn_activations": True}, "learn_activations=True needs observe_until"),
        ({"averaging_constant": 0}, "averaging_constant=0"),
        ({"observe_untill": 1}, "did you mean 'observe_until'"),
        ({"scheme": "W17A16"}, "unknown scheme 'W17A16'"),
        ({"scheme": None}, "expected either scheme"),
    ],
    ids=lambda v: str(v)[:25],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        QATModifier(**({"scheme": "W4A16"} | arguments))


def test_a_model_that_was_quantized_otherwise():
    model = network()
    compress(model, QuantizationModifier(scheme="W4A16", group_size=8))
    for modifier, message in (
        (QATModifier(scheme="W8A16", group_size=8), "'0' is quantized already as W4A16 g8 sym.*asks for W8A16 g8 sym"),
        (QATModifier(scheme="W4A16", group_size=8, targets=["0"]), "'2' is quantized already.*add it to targets"),
    ):
        with pytest.raises(ValueError, match=message):
            Lifecycle([modifier]).initialize(State(model=model))
        assert list(Quantized.find(model)) == ["0", "2"]
        assert fake_quantize_of(model[0]) is None


def test_a_shared_weight():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="the weight of '0' is shared with '1.weight'"):
        Lifecycle([QATModifier(scheme="W4A16", group_size=8)]).initialize(State(model=model))


def test_two_of_its_kind():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both = [QATModifier(scheme="W4A16", group_size=8), QATModifier(scheme="W8A16", group_size=8, targets=["2"])]
        with pytest.raises(ValueError, match="two modifiers of the recipe quantize '2', QATModifier and QATModifier#2"):
            Lifecycle(both).initialize(State(model=network()))


def test_the_static_grid_is_what_compressed_tensors_computes():
    from compressed_tensors.quantization.utils import calculate_qparams

    from lightning_compress.quant.input_parametrization import FakeQuantizeInput

    args = QuantizationArgs(**(STATIC | {"symmetric": False}))
    inputs = FakeQuantizeInput(args, 0.1, torch.zeros(1))
    inputs.take_batch(torch.tensor([-1.0]), torch.tensor([3.0]))
    scale, zero = inputs.grid()
    expected = calculate_qparams(torch.tensor([-1.0]), torch.tensor([3.0]), args)
    assert (scale, zero) == expected
