"""AutoRound: better than rounding on unseen data, never worse on what it has seen, on the grid, the rest unmoved."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_compress import AutoRoundModifier, GPTQModifier, QuantizationModifier, compress
from lightning_compress.layers.expert import ExpertLinear
from lightning_compress.layers.matrix import as_matrix
from lightning_compress.modifiers.autoround.block import LearnedBlock
from lightning_compress.modifiers.autoround.descent import Descent, descend, drawn
from lightning_compress.modifiers.autoround.grid import LearnedGrid, OnGrid
from lightning_compress.quant.fake_quant import round_weight
from lightning_compress.quant.record import Quantized
from lightning_compress.quant.rounding import find_scales
from lightning_compress.quant.schemes import from_groups
from tests.support import quantization_runs
from tests.support.quantization_runs import correlated
from tests.support.smoothing_models import batches, build, change, ignore, output, planted, targets


def groups(name: str, bits: int = 2, **weights) -> dict[str, Any]:
    return {"g": {"targets": targets(name), "weights": {"num_bits": bits, "group_size": 16, **weights}}}


def rounded_by(modifier: type, name: str, model: nn.Module, data=None, bits: int = 2, **arguments) -> nn.Module:
    model = copy.deepcopy(model)
    compress(model, modifier(config_groups=groups(name, bits), ignore=ignore(model), **arguments), data)
    return model


# -- what it is for ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "left"), [(2, 0.75), (3, 0.9)])
def test_it_beats_rounding_on_inputs_it_has_not_seen(bits, left):
    data, unseen = batches("gelu", 16), batches("gelu", 6, seed=50)
    dense = planted(build("gelu"), data[0])
    error = {
        "rtn": change(rounded_by(QuantizationModifier, "gelu", dense, bits=bits), dense, unseen),
        "autoround": change(
            rounded_by(AutoRoundModifier, "gelu", dense, data, bits, init="rtn", scale_search="minmax", iters=80),
            dense,
            unseen,
        ),
        "from gptq": change(rounded_by(AutoRoundModifier, "gelu", dense, data, bits, iters=80), dense, unseen),
    }
    assert max(error["autoround"], error["from gptq"]) < left * error["rtn"], error


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit", "mixture", "mixtral", "flat"])
@pytest.mark.parametrize("init", ["rtn", "gptq"])
def test_the_blocks_of_any_architecture_are_learned(name, init):
    """Each block's error falls below that of iterate 0, and all weights lie on the grid that is stored."""
    data = batches(name)
    model = planted(build(name), data[0])
    modifier = AutoRoundModifier(config_groups=groups(name), ignore=ignore(model), iters=12, lr=0.05, init=init)
    ledger = compress(model, modifier, data)
    rows = {row.module: row for row in ledger}
    assert set(rows) == set(Quantized.find(model)) != set()
    for module_name, row in rows.items():
        record, W_RC = Quantized.of(model.get_submodule(module_name)), as_matrix(model.get_submodule(module_name))
        assert torch.equal(round_weight(W_RC, record.scale, record.zero_point, record.scheme.weights), W_RC)
        assert record.scale.dtype == W_RC.dtype
        before, after = errors(row)
        assert after <= before
        assert row.error == pytest.approx(after, rel=1e-2)
        assert row.technique == "autoround"
        assert row.tokens > 0
    assert any(after < 0.99 * before for before, after in map(errors, rows.values()))
    assert all(torch.isfinite(output(model, batch)).all() for batch in data)


def errors(row) -> tuple[float, float]:
    before, _, after = row.flags[0].removeprefix("block error ").partition(", learned ")
    return float(before), float(after)


@pytest.mark.parametrize("scheme", [{"scheme": "W8A16", "group_size": -1}, {"scheme": "W4A16_ASYM", "group_size": 16},
                                    {"scheme": "W3A8", "group_size": 32}], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_schemes_and_dtypes(scheme, dtype):
    data = [batch.to(dtype) for batch in batches("gelu")]
    model, dense = build("gelu", dtype), build("gelu", dtype)
    ledger = compress(model, AutoRoundModifier(**scheme, iters=8), data)
    assert all(after <= before for before, after in map(errors, ledger))
    assert change(model, dense, data) < 0.5


# -- never worse ------------------------------------------------------------------------------------------------------


def lone(seed: int = 0) -> tuple[LearnedBlock, LearnedGrid, Tensor]:
    """One layer, its inputs, its learned grid."""
    layer = nn.Linear(16, 8)
    layer.weight.data = torch.randn(8, 16, generator=torch.Generator().manual_seed(seed))
    data = [correlated(20, 16, i) for i in range(4)]
    block = LearnedBlock({"fc": layer}, lambda i: layer(data[i]), lambda: None, 4, None)
    args = from_groups({"g": {"targets": ["Linear"], "weights": {"num_bits": 3, "group_size": 8}}})[0].weights
    return block, LearnedGrid(as_matrix(layer).clone(), *find_scales(as_matrix(layer), args, "minmax"), args), layer


@torch.no_grad()
@pytest.mark.parametrize("rate", [0.005, 0.5, 50.0])
def test_the_result_is_never_worse_than_iterate_0(rate):
    block, grid, layer = lone()
    with block.learning(layer, {}):
        result = descend({"fc": grid}, block, Descent(30, rate, 20, seed=0))
    assert result.ended <= result.began
    assert_close(sum(float(block.error(i)) for i in range(4)), result.ended)
    assert torch.equal(as_matrix(layer), result.weights["fc"].value())


@torch.no_grad()
def test_nor_than_the_others():
    block, grid, layer = lone()
    good = grid.now()
    bad = LearnedGrid(grid.W_RC, grid.scale * 5, None, grid.args)
    with block.learning(layer, {}):
        result = descend({"fc": bad}, block, Descent(2, 1e-3, 20, seed=0), [{"fc": good}])
    assert result.weights["fc"] is good


def test_every_batch_comes_as_often_as_any_other_and_a_seed_is_an_order():
    order = [next(it) for it in [drawn(5, 3)] for _ in range(20)]
    assert all(sorted(order[i : i + 5]) == list(range(5)) for i in range(0, 20, 5))
    assert order == [next(it) for it in [drawn(5, 3)] for _ in range(20)]
    assert order != [next(it) for it in [drawn(5, 4)] for _ in range(20)]


def test_without_steps_it_is_gptq():
    data = [correlated(40, 64, i) for i in range(4)]
    dense = nn.Sequential(nn.Linear(64, 24))
    scheme = {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 3, "group_size": 16}}}}
    ours, theirs = copy.deepcopy(dense), copy.deepcopy(dense)
    compress(ours, AutoRoundModifier(**scheme, iters=0), data)
    compress(theirs, GPTQModifier(**scheme), data)
    assert torch.equal(ours[0].weight, theirs[0].weight)
    assert torch.equal(Quantized.of(ours[0]).scale, Quantized.of(theirs[0]).scale)


# -- the block --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["Linear", "Conv1d", "Conv1D"])
def test_gradients_are_those_of_the_weight_as_a_matrix(layer):
    """Against differences of the error, weight by weight."""
    module: nn.Module = {"Linear": lambda: nn.Linear(4, 3), "Conv1d": lambda: nn.Conv1d(4, 3, 2)}.get(layer, conv1d)()
    x = torch.randn(2, 4, 5) if layer == "Conv1d" else torch.randn(2, 5, 4)
    target = torch.randn_like(module(x))
    block = LearnedBlock({"m": module}, lambda i: module(x).tanh(), lambda: None, 1, lambda i: target)
    with torch.no_grad(), block.learning(module, {}):
        block.error(0)
        with torch.enable_grad():
            error = block.error(0)
        found = block.gradients(error)["m"]
        W_RC = as_matrix(module)
        unit = target.numel() / block.power
        for r, c in [(0, 0), (2, 3), (1, W_RC.shape[1] - 1)]:
            kept, ends = float(W_RC[r, c]), []
            for step in (1e-2, -1e-2):
                W_RC[r, c] = kept + step
                ends.append(float(block.error(0)))
            W_RC[r, c] = kept
            assert float(found[r, c]) == pytest.approx(unit * (ends[0] - ends[1]) / 2e-2, rel=2e-2, abs=1e-3)


def test_experts_in_one_tensor_are_learned_each_by_its_slice():
    """Gradients of two slices are those of the tensor; what is placed in one leaves the other as it is."""
    home = nn.Module()
    home.fused = nn.Parameter(torch.randn(2, 6, 4))
    experts = {"a": ExpertLinear(home, "fused", 0, (0, 3)), "b": ExpertLinear(home, "fused", 1, (3, 6))}
    x = torch.randn(5, 4)
    block = LearnedBlock(experts, lambda i: experts["a"](x) * experts["b"](x), lambda: None, 1, lambda i: x[:, :3])
    with torch.no_grad(), block.learning(home, {}):
        block.error(0)
        with torch.enable_grad():
            error = block.error(0)
        found = block.gradients(error)
    y, z = (expert(x).detach() for expert in experts.values())
    scale = 2 * 15 / block.power
    assert_close(found["a"], scale * ((y * z - x[:, :3]) * z).t() @ x)
    assert_close(found["b"], scale * ((y * z - x[:, :3]) * y).t() @ x)


def conv1d() -> nn.Module:
    return pytest.importorskip("transformers").pytorch_utils.Conv1D(3, 4)


def test_quantized_inputs_let_the_gradient_through():
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    x = correlated(6, 8)
    block = LearnedBlock({"a": first, "b": second}, lambda i: second(first(x)), lambda: None, 1, lambda i: x)
    args = from_groups({"g": {"targets": ["Linear"], "weights": {"num_bits": 8}, "input_activations": {
        "num_bits": 4, "dynamic": True, "strategy": "token",
    }}})[0].input_activations  # fmt: skip
    with torch.no_grad():
        plain = float(block.error(0))
        with block.learning(nn.Sequential(first, second), {"a": args, "b": args}):
            with torch.enable_grad():
                error = block.error(0)
            assert float(error) != plain
            found = block.gradients(error)
        assert float(block.error(0)) == plain  # the hooks are off again
    assert all(gradient.abs().sum() > 0 for gradient in found.values())


def test_padding_does_not_count():
    data = batches("llama")
    other = copy.deepcopy(data)
    assert (other[1]["attention_mask"] == 0).any()
    other[1]["input_ids"][other[1]["attention_mask"] == 0] = 40
    models = [build("llama"), build("llama")]
    for model, batch in zip(models, (data, other), strict=True):
        compress(model, AutoRoundModifier(config_groups=groups("llama"), ignore=["lm_head"], iters=6), batch)
    for name, (module, _) in Quantized.find(models[0]).items():
        assert_close(module.weight, models[1].get_submodule(name).weight)


# -- nothing else moves -----------------------------------------------------------------------------------------------


def test_the_rest_of_the_model_stays_as_it_is():
    model = build("llama").requires_grad_(True)
    model.model.embed_tokens.weight.requires_grad_(False)
    before, keys = copy.deepcopy(model), list(model.state_dict())
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
    compress(model, AutoRoundModifier(config_groups=groups("llama"), ignore=["lm_head"], iters=4), batches("llama"))
    assert list(model.state_dict()) == keys
    learned = {f"{name}.weight" for name in Quantized.find(model)}
    for (name, new), old in zip(model.named_parameters(), before.parameters(), strict=True):
        assert new.grad is None
        assert new.requires_grad == old.requires_grad
        assert torch.equal(new, old) == (name not in learned)
    assert sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()) == hooks


def test_the_seed_decides_and_the_mode_of_the_caller_does_not():
    def result(seed: int, inference: bool = False) -> Tensor:
        model = build("gelu")
        with torch.inference_mode(inference):
            torch.rand(3)  # the global state has no say
            compress(
                model,
                AutoRoundModifier(config_groups=groups("gelu"), iters=9, batch_size=1, seed=seed, init="rtn"),
                batches("gelu"),
            )
        return torch.cat([module.weight.flatten() for module, _ in Quantized.find(model).values()])

    first = result(0)
    assert torch.equal(first, result(0))
    assert torch.equal(first, result(0, inference=True))
    assert not torch.equal(first, result(1))


@pytest.mark.parametrize("init", ["rtn", "gptq"])
def test_pruned_weights_stay_zero(init):
    model = build("gelu")
    keep = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            keep[name] = torch.rand(module.weight.shape, generator=torch.Generator().manual_seed(0)) > 0.5
            module.weight.data *= keep[name]
    arguments = {"config_groups": groups("gelu", 3, symmetric=False), "iters": 10, "init": init}
    ledger = compress(model, AutoRoundModifier(**arguments), batches("gelu"))
    for row in ledger:
        assert (model.get_submodule(row.module).weight[~keep[row.module]] == 0).all()
        assert row.sparsity >= 0.49
    other = build("gelu")
    for name, mask in keep.items():
        other.get_submodule(name).weight.data *= mask
    rows = compress(other, AutoRoundModifier(**arguments, preserve_zeros=False), batches("gelu")).rows
    assert {row.sparsity for row in rows} == {None}


# -- what it says -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheme": "W4A16", "iters": -1}, "iters=-1: Input should be greater than or equal to 0"),
        ({"scheme": "W4A16", "lr": 0}, "lr=0: Input should be greater than 0"),
        ({"scheme": "W4A16", "batch_size": 0}, "batch_size=0: Input should be greater than or equal to 1"),
        ({"scheme": "FP8_DYNAMIC"}, "is not a grid of integers, which AutoRound rounds to; take an integer"),
        ({"scheme": "NVFP4A16"}, "which AutoRoundModifier does not know"),
        ({"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 8}, "input_activations": {
            "num_bits": 8, "strategy": "tensor"}}}}, "static activations are not calibrated while"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_when_it_is_built(arguments, message):
    with pytest.raises(ValueError, match=message):
        AutoRoundModifier(**arguments)


def test_one_pass_is_refused_before_any_work():
    model = build("gelu")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="AutoRoundModifier finishes whole blocks, not single modules; use walk='two"):
        compress(model, AutoRoundModifier(config_groups=groups("gelu")), batches("gelu"), walk="one_pass")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_no_replay_no_learning():
    modifier = AutoRoundModifier(config_groups=groups("gelu"))
    with pytest.raises(ValueError, match="must run block '' again to learn its rounding, but its inputs are gone"):
        quantization_runs.calibrate(build("gelu"), modifier, batches("gelu"))


def test_it_needs_data():
    with pytest.raises(ValueError, match="AutoRoundModifier needs calibration data"):
        compress(build("gelu"), AutoRoundModifier(config_groups=groups("gelu")))


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).detach()


def test_a_block_without_gradient_is_named():
    with pytest.raises(ValueError, match=r"no gradient of the block's output reaches '0.fc': is there a"):
        compress(
            nn.Sequential(Detached(), Detached()), AutoRoundModifier(config_groups=groups("gelu")), batches("gelu")
        )


def test_who_never_saw_data_is_named_and_rounded():
    model = quantization_runs.attention()
    modifier = AutoRoundModifier(config_groups=groups("gelu"), iters=2)
    with pytest.warns(UserWarning, match="AutoRoundModifier: spare never saw data and were rounded to nearest"):
        rows = {row.module: row for row in compress(model, modifier, quantization_runs.batches(2))}
    assert rows["spare"].flags == ["never saw data; rounded to nearest"]
    assert Quantized.of(model.spare) is not None


class Stemmed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(32, 32), nn.Linear(32, 16)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


def test_in_front_of_the_blocks_nothing_is_learned_and_behind_them_by_the_output():
    torch.manual_seed(0)
    rows = {row.module: row for row in compress(
        Stemmed(), AutoRoundModifier(config_groups=groups("gelu"), iters=40, init="rtn"), batches("gelu")
    )}  # fmt: skip
    assert rows["stem"].flags == ["its pass ends here; not learned"]
    assert rows["stem"].error is None
    before, after = errors(rows["head"])
    assert after < before


def test_a_weight_on_its_grid_is_what_the_record_says():
    """(c - z) s, code by code."""
    codes = torch.tensor([[-2, 1, 0, 3], [3, 3, -1, 0]], dtype=torch.int16)
    args = from_groups({"g": {"targets": ["Linear"], "weights": {"num_bits": 3, "group_size": 2}}})[0].weights
    scale = torch.tensor([[0.5, 2.0], [1.0, 0.25]])
    assert OnGrid(codes, scale, None, args).value().tolist() == [[-1.0, 0.5, 0.0, 6.0], [3.0, 3.0, -0.25, 0.0]]
