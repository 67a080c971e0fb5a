"""AutoRound: better than rounding on unseen data, never worse on what it has seen, on the grid, the rest unmoved."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import AutoRoundModifier, QuantizationModifier, compress, load, save
from lightning_compress.layers.matrix import as_matrix
from lightning_compress.modifiers.autoround.grid import OnGrid
from lightning_compress.quant.fake_quant import round_weight
from lightning_compress.quant.record import Quantized
from lightning_compress.quant.schemes import from_groups
from tests.support import quantization_runs
from tests.support.smoothing_models import batches, build, change, ignore, output, planted, targets


def groups(name: str, bits: int = 2, **weights) -> dict[str, Any]:
    return {"g": {"targets": targets(name), "weights": {"num_bits": bits, "group_size": 16, **weights}}}


def rounded_by(modifier: type, name: str, model: nn.Module, data=None, bits: int = 2, **arguments) -> nn.Module:
    model = copy.deepcopy(model)
    compress(model, modifier(config_groups=groups(name, bits), ignore=ignore(model), **arguments), data)
    return model


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


BLOCKS = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "block", "block_structure": [24, 24]}
STATIC = {"num_bits": 8, "strategy": "tensor"}


@pytest.mark.parametrize("init", ["rtn", "gptq"])
@pytest.mark.parametrize("scheme", ["NVFP4A16", "NVFP4", "MXFP4A16", "MXFP4", "FP8_DYNAMIC", "FP8", {"weights": BLOCKS},
                                    {"weights": {"num_bits": 4, "group_size": 16}, "input_activations": STATIC}],
                         ids=str)  # fmt: skip
def test_floats_blocks_and_static_activations_are_learned_and_reloaded(scheme, init, tmp_path):
    data = batches("gelu")
    model = planted(build("gelu"), data[0])
    ledger = compress(model, AutoRoundModifier(scheme=scheme, iters=10, lr=0.03, init=init), data)
    assert all(after <= before for before, after in map(errors, ledger))
    assert any(after < before for before, after in map(errors, ledger)) or init == "gptq"
    save(model, tmp_path)
    loaded = load(tmp_path, build("gelu"), packed=False)
    assert Quantized.find(loaded).keys() == Quantized.find(model).keys()
    for batch in data:
        assert torch.equal(output(loaded, batch), output(model, batch))


@pytest.mark.parametrize("scheme", ["NVFP4A16", "MXFP4A16"])
def test_learned_rounding_beats_rounding_in_four_bit_floats(scheme):
    data, unseen = batches("gelu", 16), batches("gelu", 6, seed=50)
    dense = planted(build("gelu"), data[0])
    error = {}
    for name, modifier in {
        "rtn": QuantizationModifier(scheme=scheme),
        "learned": AutoRoundModifier(scheme=scheme, init="rtn", scale_search="minmax", iters=80),
    }.items():
        model = copy.deepcopy(dense)
        compress(model, modifier, data)
        error[name] = change(model, dense, unseen)
    assert error["learned"] < 0.95 * error["rtn"], error


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheme": "W4A16", "iters": -1}, "iters=-1: Input should be greater than or equal to 0"),
        ({"scheme": "W4A16", "lr": 0}, "lr=0: Input should be greater than 0"),
        ({"scheme": "W4A16", "batch_size": 0}, "batch_size=0: Input should be greater than or equal to 1"),
        ({"scheme": "W4A16", "observer": "max"}, "observer='max'"),
    ],
)
def test_unsupported_schemes_are_refused_at_construction(arguments, message):
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
    with pytest.raises(ValueError, match="must run block '' again to learn its rounding, but its inputs are not"):
        quantization_runs.calibrate(build("gelu"), modifier, batches("gelu"))


def test_it_needs_data():
    with pytest.raises(ValueError, match="AutoRoundModifier needs calibration data"):
        compress(build("gelu"), AutoRoundModifier(config_groups=groups("gelu")))


def test_layers_without_data_are_named_and_rounded():
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
