"""Structured pruning: shapes shrink, what stays computes what it did, and the optimizer keeps its memory."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lightning_compress import compress
from lightning_compress.core import Event, EventType, Lifecycle, State
from lightning_compress.modifiers.structured.modifier import StructuredPruningModifier
from tests.support.structure_runs import images, llama, residuals, silenced, tokens
from tests.support.training_loop import train

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.05),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adam amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
}


def initialized(model, *modifiers):
    """The lifecycle at the end of set-up, as compress() and the callback begin."""
    lifecycle = Lifecycle(modifiers)
    lifecycle.initialize(State(model=model))
    return lifecycle


def perceptron(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 8))


# -- transformer blocks -----------------------------------------------------------------------------------------------


def test_mlps_lose_their_weakest_neurons_and_compute_as_if_those_were_zero():
    model, dense = llama(), llama()
    initialized(model, StructuredPruningModifier(dimension="mlp", ratio=0.25, start=0))
    zeroed = {}
    for name, mlp in dense.named_modules():
        if type(mlp).__name__ == "LlamaMLP":
            parts = [mlp.gate_proj.weight.square().sum(1), mlp.up_proj.weight.square().sum(1)]
            weakest = sum(parts, mlp.down_proj.weight.square().sum(0)).argsort()[:12]
            zeroed[f"{name}.down_proj"] = lambda x, weakest=weakest: x.index_fill(-1, weakest, 0.0)
            small = model.get_submodule(name)
            assert (small.gate_proj.out_features, small.up_proj.out_features, small.down_proj.in_features) == (36,) * 3
    silenced(dense, zeroed)
    assert len(zeroed) == 3
    assert model.config.intermediate_size == 36
    assert_close(model(**tokens()).logits, dense(**tokens()).logits)


def test_heads_go_in_groups_and_the_rest_computes_as_if_those_were_zero():
    model, dense = llama(), llama()
    initialized(model, StructuredPruningModifier(dimension="heads", ratio=0.5, start=0))
    zeroed = {}
    for name, attention in dense.named_modules():
        if type(attention).__name__ == "LlamaAttention":
            makers = [getattr(attention, f"{p}_proj").weight.view(4, -1).square().sum(1) for p in "qkv"]
            columns = attention.o_proj.weight.t().reshape(4, -1).square().sum(1)
            weakest = sum(makers, columns).argsort()[:2]
            places = torch.cat([torch.arange(8) + 8 * int(g) for g in weakest])  # 2 query heads of 4 in each group
            zeroed[f"{name}.o_proj"] = lambda x, places=places: x.index_fill(-1, places, 0.0)
    silenced(dense, zeroed)
    assert (model.config.num_attention_heads, model.config.num_key_value_heads, model.config.head_dim) == (4, 2, 4)
    assert model.model.layers[0].self_attn.q_proj.weight.shape == (16, 32)
    assert_close(model(**tokens()).logits, dense(**tokens()).logits)
    with torch.no_grad():
        generated = model.generate(**tokens(count=1), max_new_tokens=4, do_sample=False, use_cache=True)
        plain = model.generate(**tokens(count=1), max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(generated, plain)


def test_mlps_and_heads_stack():
    model = llama()
    modifiers = [StructuredPruningModifier(dimension=d, ratio=r, start=0) for d, r in (("mlp", 0.5), ("heads", 0.25))]
    initialized(model, *modifiers)
    rebuilt = type(model)(model.config).eval()
    rebuilt.load_state_dict(model.state_dict())
    assert_close(rebuilt(**tokens()).logits, model(**tokens()).logits)


# -- any network ------------------------------------------------------------------------------------------------------


def test_channels_are_followed_through_residuals_and_norms():
    model, dense = residuals().eval(), residuals().eval()
    modifier = StructuredPruningModifier(dimension="channels", ratio=0.5, start=0, input_shape=[1, 8, 8])
    initialized(model, modifier)
    assert model.stem.weight.shape == (4, 1, 3, 3)
    assert model.first.bn1.num_features == len(model.first.bn1.running_var) == 4
    assert (model.depthwise.groups, model.depthwise.in_channels) == (4, 4)
    assert (model.head.in_features, model.head.out_features) == (16, 10)
    weakest = {}
    for name in ("first", "second"):
        block = dense.get_submodule(name)
        score = block.conv1.weight.square().sum((1, 2, 3)) + block.conv2.weight.square().sum((0, 2, 3))
        weakest[name] = score.argsort()[:4]
    stream = (
        dense.stem.weight.square().sum((1, 2, 3)) + dense.depthwise.weight.square().sum((1, 2, 3))
        + dense.head.weight.view(10, 8, 4).square().sum((0, 2))
        + sum(b.conv1.weight.square().sum((0, 2, 3)) + b.conv2.weight.square().sum((1, 2, 3))
              for b in (dense.first, dense.second))
    ).argsort()[:4]  # fmt: skip
    silenced(
        dense,
        {
            "first.conv2": lambda x: x.index_fill(1, weakest["first"], 0.0),
            "second.conv2": lambda x: x.index_fill(1, weakest["second"], 0.0),
            "first": lambda x: x.index_fill(1, stream, 0.0),
            "second": lambda x: x.index_fill(1, stream, 0.0),
            "depthwise": lambda x: x.index_fill(1, stream, 0.0),
            "head": lambda x: x.view(-1, 8, 4).index_fill(1, stream, 0.0).flatten(1),
        },
    )
    x, _ = images()
    assert_close(model(x), dense(x))


def test_the_layer_that_makes_the_output_stays_whole_and_the_ledger_says_so():
    model, modifier = (
        residuals(),
        StructuredPruningModifier(dimension="channels", ratio=0.5, start=0, input_shape=[1, 8, 8]),
    )
    state = State(model=model)
    Lifecycle([modifier]).initialize(state)
    rows = {row.module: row for row in state.ledger}
    assert rows["head"].flags == ["left whole: it makes the output of the model"]
    assert rows["stem"].scheme == "8 -> 4 channels"
    before, after = (sum(p.numel() for p in m.parameters()) for m in (residuals(), model))
    assert rows["stem"].flags == [f"the model: {before} -> {after} parameters"]


def test_following_channels_changes_neither_modes_nor_statistics():
    model = residuals().train()
    model.second.eval()
    model.stem.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    modifier = StructuredPruningModifier(dimension="channels", ratio=0.5, start=5, input_shape=[1, 8, 8])
    state = torch.get_rng_state()
    initialized(model, modifier)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert model.first.training
    assert not model.second.training
    assert not model.stem.weight.requires_grad


# -- while training ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_optimizer_goes_on_with_what_it_remembers(optimizer):
    """The small model trains exactly as the dense one whose removed neurons have no way in or out."""
    model = perceptron()
    made = OPTIMIZERS[optimizer](model.parameters())
    modifier = StructuredPruningModifier(dimension="channels", targets=["0"], ratio=0.5, start=3)
    memory = {}

    def look(step):
        if step == 3:
            memory["before"] = copy.deepcopy(made.state_dict())
            memory["weights"] = copy.deepcopy(model.state_dict())

    lifecycle = train(model, [modifier], 3, optimizer=made, after_step=look)
    train(model, [modifier], 4, first=3, optimizer=made, lifecycle=lifecycle)
    assert model[0].weight.shape == (16, 16)
    assert model[2].weight.shape == (24, 16)
    assert {id(p) for g in made.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    assert set(made.state) == set(model.parameters())

    dense = memory["weights"]
    score = dense["0.weight"].square().sum(1) + dense["2.weight"].square().sum(0)
    kept = score.argsort(descending=True)[:16].sort().values
    along = {0: (0, kept), 1: (0, kept), 2: (1, kept)}  # parameter -> dimension
    small = perceptron()
    small[0], small[2] = nn.Linear(16, 16), nn.Linear(16, 24)
    small.load_state_dict(
        {name: value.index_select(*along[i]) if i in along else value for i, (name, value) in enumerate(dense.items())}
    )
    other = OPTIMIZERS[optimizer](small.parameters())
    state = copy.deepcopy(memory["before"])
    for i, entry in state["state"].items():
        for key, value in entry.items():
            if torch.is_tensor(value) and value.dim() and i in along:
                entry[key] = value.index_select(*along[i])
    other.load_state_dict(state)
    train(small, [], 4, first=3, optimizer=other, lifecycle=_nothing(small))
    for name, value in small.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def _nothing(model):
    return initialized(model, StructuredPruningModifier(dimension="channels", ratio=0.5, start=99, input_shape=[16]))


def test_pruning_follows_the_schedule_down_to_its_end():
    model, sizes = perceptron(), []
    modifier = StructuredPruningModifier(
        dimension="channels", targets=["0"], ratio=0.75, start=0, end=8, update=2, round_to=4
    )
    train(model, [modifier], 12, after_step=lambda step: sizes.append(model[0].out_features))
    # 32 neurons, share 0.75 p at steps 2, 4, 6, rounded up to a multiple of 4; the first forward knows the channels
    assert sizes == [32, 32, 28, 28, 20, 20, 16, 16, 8, 8, 8, 8]


def test_at_start_zero_without_an_input_shape_channels_go_after_the_first_batch():
    model, sizes = perceptron(), []
    modifier = StructuredPruningModifier(dimension="channels", targets=["0"], ratio=0.5, start=0)
    train(model, [modifier], 3, after_step=lambda step: sizes.append(model[0].out_features))
    assert sizes == [32, 16, 16]


def test_taylor_keeps_what_the_loss_needs():
    """A neuron whose output nobody changes the loss by goes first, large as it may be."""
    torch.manual_seed(0)
    model = perceptron()
    idle = torch.tensor([3, 7, 11, 30])
    with torch.no_grad():
        model[0].weight[idle] = 0.5
        model[0].bias[idle] = -100.0  # never active: no gradient
    kept_bias = model[0].bias.detach()
    modifier = StructuredPruningModifier(dimension="channels", targets=["0"], ratio=0.125, start=2, importance="taylor")
    train(model, [modifier], 3, optimizer=torch.optim.SGD(model.parameters(), lr=0.01))
    assert model[0].out_features == 28
    assert model[0].bias.min() > -50
    assert kept_bias.shape == (32,)


def test_taylor_is_the_squared_derivative_by_a_gate():
    model = perceptron()
    modifier = StructuredPruningModifier(
        dimension="channels", targets=["0"], ratio=0.5, start=5, importance="taylor", input_shape=[16]
    )
    lifecycle = initialized(model, modifier)
    x, y = torch.randn(8, 16), torch.randint(0, 8, (8,))
    gates_in, gates_out = torch.ones(32, requires_grad=True), torch.ones(32, requires_grad=True)
    hidden = torch.relu(nn.functional.linear(x, model[0].weight * gates_in[:, None], model[0].bias))
    hidden = torch.relu(nn.functional.linear(hidden, model[2].weight * gates_out, model[2].bias))
    nn.functional.cross_entropy(model[4](hidden), y).backward()
    expected = gates_in.grad.square() + gates_out.grad.square()
    state = State(model=model)
    lifecycle.emit(state, Event(EventType.BATCH_START, 0))
    lifecycle.emit(state, Event(EventType.OPTIM_PRE_STEP, 0))
    assert_close(modifier._sums["0"].float(), expected)


def test_activations_rank_neurons_while_training_and_validation_does_not_count():
    model = perceptron()
    with torch.no_grad():
        model[0].weight[:16] *= 0.01  # quiet, though wide awake further on
        model[0].bias[:16] = 0
        model[2].weight[:, :16] *= 100
    modifier = StructuredPruningModifier(
        dimension="channels", targets=["0"], ratio=0.5, start=1, importance="activation", input_shape=[16]
    )
    loud = model[0].weight.detach()[16:].clone()
    lifecycle = initialized(model, modifier)
    model.eval()(torch.randn(4, 16))
    assert not modifier._seen
    train(model, [modifier], 2, optimizer=torch.optim.SGD(model.parameters(), lr=0.0), lifecycle=lifecycle)
    assert torch.equal(model[0].weight, loud)
    assert not modifier.hooked


def test_an_optimizer_whose_state_cannot_be_cut_is_refused():
    model = perceptron()
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.01)
    modifier = StructuredPruningModifier(dimension="channels", targets=["0"], ratio=0.5, start=2)
    with pytest.raises(ValueError, match=r"Adafactor keeps '\w+' of shape .* prune at set-up"):
        train(model, [modifier], 4, optimizer=optimizer)


# -- bad input --------------------------------------------------------------------------------------------------------

REFUSED = [
    ({"ratio": 1.0}, "ratio=1.0: Input should be less than 1"),
    ({"ratio": -0.1}, "ratio=-0.1: Input should be greater than or equal to 0"),
    ({"round_to": 0}, "round_to=0: Input should be greater than or equal to 1"),
    ({"input_shape": [4]}, "input_shape is for dimension='channels'"),
    ({"importance": "taylor"}, "needs gradients: give start"),
    ({"importance": "taylor", "start": 0}, "needs batches before the cut, and start=0 cuts at set-up"),
    ({"importance": "activation", "start": 0, "end": 9, "schedule": "constant"}, "needs batches before the cut"),
    ({"start": 2, "end": 4, "update": 3}, "update=3.0 is larger than the window from 2.0 to 4.0"),
    ({"dimension": "layers"}, "dimension='layers'"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=lambda v: str(v)[:40])
def test_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        StructuredPruningModifier(**arguments)


UNFIT = [
    (llama, {"ratio": 1 - 1e-12}, "leaves none of the 48 neurons of 'model.layers.0.mlp'"),
    (llama, {"ratio": 0.01}, "removes none of the 48 neurons"),
    (llama, {"ratio": 0.25, "round_to": 64}, "with round_to=64 removes none of the 48 neurons"),
    (llama, {"dimension": "heads", "ratio": 0.3}, "cuts through the 4 key/value heads .* give one of 0.25, 0.5, 0.75"),
    (llama, {"targets": ["re:.*layers.0.mlp"]}, "cannot state the sizes after pruning.*prune all blocks alike"),
    (llama, {"targets": ["re:.*self_attn"]}, "matches no mlp group: .* such as 'model.layers.0.mlp' or 'LlamaMLP'"),
    (llama, {"targets": ["LlamaMPL"]}, "did you mean 'LlamaMLP'"),
    (llama, {"dimension": "channels"}, "does not follow a LlamaForCausalLM"),
    (perceptron, {}, "found no MLP"),
    (perceptron, {"dimension": "heads"}, "found no attention with q_proj"),
    (perceptron, {"dimension": "channels", "targets": ["ReLU"]}, r"targets without output channels: 1 \(ReLU\)"),
    (perceptron, {"dimension": "channels", "targets": ["4"], "input_shape": [16]}, "'4' makes the output of the model"),
    (
        perceptron,
        {"dimension": "channels", "targets": ["re:4"], "input_shape": [16]},
        "every target makes the output",
    ),
    (
        lambda: nn.Sequential(nn.Conv1d(4, 8, 1), nn.Conv1d(8, 8, 1, groups=2), nn.Conv1d(8, 4, 1)),
        {"dimension": "channels", "input_shape": [4, 5], "targets": ["0"]},
        "cannot prune through '1': a convolution with groups=2",
    ),
    (
        lambda: nn.Sequential(nn.Conv1d(4, 8, 1), nn.GroupNorm(2, 8), nn.Conv1d(8, 4, 1)),
        {"dimension": "channels", "input_shape": [4, 5]},
        "cannot prune through '1', a GroupNorm",
    ),
]


@pytest.mark.parametrize(("build", "arguments", "message"), UNFIT, ids=lambda v: getattr(v, "__name__", str(v)[:40]))
def test_models_that_do_not_fit_are_refused_at_set_up(build, arguments, message):
    model = build()
    before = {name: p.shape for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        initialized(model, StructuredPruningModifier(**{"start": 0, "ratio": 0.5, **arguments}))
    assert {name: p.shape for name, p in model.named_parameters()} == before


def test_several_processes_prune_at_set_up_only(monkeypatch):
    monkeypatch.setattr("lightning_compress.modifiers.structured.modifier.world_size", lambda: 2)
    with pytest.raises(ValueError, match="cannot change once DDP has wrapped it: prune at set-up with start=0"):
        initialized(llama(), StructuredPruningModifier(start=10))
    initialized(llama(), StructuredPruningModifier(start=0))


def test_without_the_library_channels_are_refused_and_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-compress\[structured\]'"):
        initialized(perceptron(), StructuredPruningModifier(dimension="channels", start=0))
    initialized(llama(), StructuredPruningModifier(dimension="mlp", start=0))


@pytest.mark.filterwarnings("ignore")
def test_auto_takes_mlps_where_there_are_some_and_channels_elsewhere():
    block = nn.ModuleDict({"fc1": nn.Linear(8, 16), "fc2": nn.Linear(16, 8)})

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = block

        def forward(self, x):
            return self.mlp["fc2"](self.mlp["fc1"](x).relu())

    model, batch = nn.Sequential(Block(), nn.Linear(8, 4)), torch.randn(4, 8)
    compress(model, StructuredPruningModifier(dimension="auto", ratio=0.5), [batch])
    assert [model[0].mlp["fc1"].out_features, model[1].in_features] == [8, 8]
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    compress(model, StructuredPruningModifier(dimension="auto", ratio=0.5), [batch])
    assert [model[0].out_features, model[2].out_features] == [8, 4]
