import copy
import warnings

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from lightning_compress import compress
from lightning_compress.core import Lifecycle, State
from lightning_compress.layers.matrix import as_matrix
from lightning_compress.modifiers.quantization import QuantizationModifier
from lightning_compress.quant import scales
from lightning_compress.quant.record import Quantized
from tests.support.architecture_models import ARCHITECTURES
from tests.support.quantization_runs import attention, batches, calibrate, correlated, weights

GRAINS = [{"group_size": 16}, {"strategy": "channel"}, {"strategy": "tensor"}]


def groups(**args):
    return {"g": {"targets": ["Linear"], "weights": args}}


def rounded(W, bits=4, group=16):
    """Round to nearest by its definition: symmetric, min-max."""
    blocks = W.view(len(W), -1, group)
    scale = blocks.abs().amax(-1, keepdim=True) / ((2**bits - 1) / 2)
    return ((blocks / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale).view(W.shape)


def test_round_to_nearest_by_its_definition_without_any_data():
    model = attention()
    before = weights(model)
    ledger = calibrate(model, QuantizationModifier(scheme="W4A16", group_size=16), [])
    for name, W in before.items():
        assert_close(model.get_parameter(name), rounded(W), rtol=0, atol=1e-7)
    assert [row.module for row in ledger] == ["q", "k", "v", "o", "spare"]
    row = ledger.rows[0]
    W, Q = before["q.weight"], model.q.weight.detach()
    assert row.error == pytest.approx(float((W - Q).square().sum() / W.square().sum()), rel=1e-4)
    assert row.scheme == "W4A16 g16 sym"
    assert row.bits == 4 + 32 / 16 + 16 * 8 / W.numel()
    assert (row.technique, row.bytes_before, row.flags, row.tokens) == ("rtn", W.numel() * 4, [], None)


@pytest.mark.parametrize("search", ["minmax", "mse"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("grain", GRAINS, ids=str)
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_weight_is_on_the_grid_that_is_exported(bits, grain, symmetric, search):
    model = attention()
    calibrate(
        model,
        QuantizationModifier(config_groups=groups(num_bits=bits, symmetric=symmetric, **grain), scale_search=search),
        [],
    )
    record = Quantized.of(model.q)
    args = record.scheme.weights
    zero = torch.zeros_like(record.scale, dtype=torch.int8) if record.zero_point is None else record.zero_point
    codes = quantize(model.q.weight, record.scale, zero, args, dtype=torch.int8)
    assert codes.min() >= -(2 ** (bits - 1))
    assert codes.max() <= 2 ** (bits - 1) - 1
    assert torch.equal(dequantize(codes, record.scale, zero, args), model.q.weight)
    assert record.scale.shape == {"group": (64, 4), "channel": (64, 1), "tensor": (1,)}[args.strategy]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_weights_reload_to_the_bit(dtype):
    model = attention().to(dtype)
    calibrate(model, QuantizationModifier(scheme="W8A16", group_size=32), [])
    record = Quantized.of(model.q)
    assert record.scale.dtype == model.q.weight.dtype == dtype
    zero = torch.zeros_like(record.scale, dtype=torch.int8)
    wide = model.q.weight.float(), record.scale.float()  # in bf16 the quotient itself misses 8-bit codes
    codes = quantize(*wide, zero, record.scheme.weights, dtype=torch.int8)
    assert torch.equal(dequantize(codes, record.scale, zero, record.scheme.weights), model.q.weight)


def test_mse_scales_lower_the_error_they_minimize():
    errors = {}
    for search in ("minmax", "mse"):
        model = attention()
        before = weights(model)
        calibrate(model, QuantizationModifier(scheme="W3A16", group_size=32, scale_search=search), [])
        errors[search] = {n: (model.get_parameter(n) - W).abs().pow(2.4).sum().item() for n, W in before.items()}
    assert all(errors["mse"][n] < 0.95 * errors["minmax"][n] for n in errors["mse"])


def test_weights_on_their_grid_stay_as_they_are():
    model = attention()
    codes = torch.randint(-8, 8, (64, 64))
    codes[:, 0::16], codes[:, 1::16] = -8, 7
    model.q.weight.data = codes * 0.25
    before = model.q.weight.clone()
    calibrate(model, QuantizationModifier(scheme="W4A16_ASYM", group_size=16), [])
    assert torch.equal(model.q.weight, before)


def test_dynamic_activations_are_quantized_and_need_no_data():
    model, x = attention(), batches(1)[0]
    modifier = QuantizationModifier(scheme="W8A8")
    assert not modifier.needs.data
    calibrate(model, modifier, [])
    token = x.abs().amax(-1, keepdim=True) / 127.5
    expected = nn.functional.linear((x / token).round().clamp(-128, 127) * token, model.q.weight, model.q.bias)
    assert_close(model.q(x), expected)


def test_static_activations_by_their_extremes():
    model, data = attention(), batches(3)
    modifier = QuantizationModifier(scheme="FP8", ignore="spare")
    assert modifier.needs.data
    calibrate(model, modifier, data)
    record = Quantized.of(model.q)
    assert_close(record.input_scale, torch.stack(data).abs().max()[None] / 448)
    assert record.input_zero_point is None
    assert_close(record.scale, model.q.weight.abs().max()[None] / 448)
    assert (model.q.weight / record.scale).to(torch.float8_e4m3fn).float().mul(record.scale).equal(model.q.weight)


def test_padding_does_not_stretch_static_activations():
    model, (x,) = attention(), batches(1)
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    mask[0, 30:] = False
    padded = x.clone()
    padded[0, 30:] = 1e4
    modifier = QuantizationModifier(scheme="FP8", targets=["q"])
    calibrate(model, modifier, [padded], [mask])
    assert_close(Quantized.of(model.q).input_scale, x[mask].abs().max()[None] / 448)


def test_static_asymmetric_activations():
    config = groups(num_bits=8, strategy="channel")
    config["g"] |= {"input_activations": {"num_bits": 8, "symmetric": False}, "targets": ["q", "k", "v", "o"]}
    model = attention()
    calibrate(model, QuantizationModifier(config_groups=config, observer="mse"), batches(2))
    record = Quantized.of(model.o)
    assert record.input_zero_point.shape == record.input_scale.shape == (1,)
    model(batches(1)[0])


def test_static_targets_that_never_saw_data_are_named_and_left():
    model = attention()
    before = weights(model)
    with pytest.warns(UserWarning, match="spare never saw data, so that static activation scales are unknown"):
        ledger = calibrate(model, QuantizationModifier(scheme="FP8"), batches(1))
    assert ledger.rows[-1].flags == ["never saw data; left as it was"]
    assert torch.equal(model.spare.weight, before["spare.weight"])
    assert Quantized.of(model.spare) is None


def test_imatrix_scales_lower_the_error_that_inputs_weigh():
    data, found = batches(4), {}
    h = torch.cat(data).flatten(0, 1).square().mean(0)
    for search in ("minmax", "mse", "imatrix"):
        model = attention()
        before = weights(model)
        ledger = calibrate(model, QuantizationModifier(scheme="W3A16", group_size=16, scale_search=search), data)
        gaps = [before[f"{n}.weight"] - model.get_submodule(n).weight.detach() for n in "qkv"]
        found[search] = sum(float((gap.square() @ h).sum()) for gap in gaps)
    assert found["imatrix"] < 0.8 * min(found["mse"], found["minmax"])
    assert ledger.rows[-1].flags == ["never saw data; scales by mse"]  # spare


def test_hessian_scales_lower_what_the_outputs_lose():
    data, found = batches(4), {}
    x = torch.cat(data).flatten(0, 1)
    for search in ("minmax", "imatrix", "hessian"):
        model = attention()
        before = weights(model)
        ledger = calibrate(model, QuantizationModifier(scheme="W3A16", group_size=16, scale_search=search), data)
        gaps = [before[f"{n}.weight"] - model.get_submodule(n).weight.detach() for n in "qkv"]
        groups = [(gap[:, i : i + 16] @ x[:, i : i + 16].t()).square().sum() for gap in gaps for i in range(0, 64, 16)]
        found[search] = float(sum(groups))
    assert found["hessian"] < 0.95 * found["imatrix"] < 0.8 * found["minmax"]
    assert ledger.rows[0].tokens == len(x)
    assert ledger.rows[-1].flags == ["never saw data; scales by mse"]  # spare


def test_hessian_scales_are_those_of_the_blocks_on_the_diagonal_of_h():
    """Whatever the batches, and with padding left out; q, k and v share one statistic."""
    data = batches(4)
    x = torch.cat(data).flatten(0, 1)
    args = QuantizationArgs(num_bits=3, group_size=16)
    H_Ggg = torch.stack([part.t() @ part / len(part) for part in x.split(16, 1)])
    before, modifier = attention(), {"scheme": "W3A16", "group_size": 16, "scale_search": "hessian"}
    mask = torch.ones(8, 60, dtype=torch.bool)
    mask[:, 48:] = False
    padded = torch.cat([torch.cat(data), torch.full((8, 12, 64), 50.0)], 1)
    runs = {"whole": ([torch.cat(data)], ()), "batches": (data, ()), "padded": ([padded], [mask]), "alone": (data, ())}
    for name, (given, masks) in runs.items():
        model = attention()
        calibrate(model, QuantizationModifier(**modifier, share_inputs=name != "alone"), given, masks)
        for n in "qkv":
            expected = scales.search(as_matrix(before.get_submodule(n)), args, H_Ggg=H_Ggg)[0]
            assert_close(Quantized.of(model.get_submodule(n)).scale, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("layer", ["grouped conv", "transposed"])
@pytest.mark.parametrize("grain", [{"strategy": "channel"}, {"strategy": "tensor"}, {"group_size": 4}], ids=str)
def test_hessian_scales_of_other_layers(layer, grain):
    torch.manual_seed(0)
    module, x = {
        "grouped conv": (nn.Conv1d(16, 32, 2, groups=4), correlated(64, 16).reshape(4, 16, 16).mT.contiguous()),
        "transposed": (Conv1D(32, 16), correlated(64, 16)),
    }[layer]
    model = nn.Sequential(module)
    with torch.no_grad():
        wanted, lost = model(x), {}
    for how in ("minmax", "hessian"):
        tried = copy.deepcopy(model)
        config = groups(num_bits=2, **grain)
        config["g"]["targets"] = [type(module).__name__]
        calibrate(tried, QuantizationModifier(config_groups=config, scale_search=how), [x])
        with torch.no_grad():
            lost[how] = float((tried(x) - wanted).square().sum())
    assert lost["hessian"] < (0.97 if grain.get("strategy") == "tensor" else 0.9) * lost["minmax"]


def test_hessian_scales_are_the_same_in_one_pass_and_in_two():
    """In lockstep q is rounded before k and v have seen a token: they join its statistic."""
    found = []
    for walk in ("one_pass", "two_pass"):
        model, data = ARCHITECTURES["llama"].build(), ARCHITECTURES["llama"].batches(2)
        arguments = {"targets": ["re:.*layers.0.*proj"], "scheme": "W3A16", "group_size": 16}
        compress(model, QuantizationModifier(**arguments, scale_search="hessian"), data, walk=walk)
        found.append({n: Quantized.of(model.get_submodule(f"model.layers.0.self_attn.{n}_proj")).scale for n in "qkv"})
    assert_close(found[0], found[1], rtol=1e-3, atol=0)


def test_modules_whose_inputs_differ_after_sharing_are_named():
    def run(**arguments):
        model = nn.ModuleDict({"a": nn.Linear(16, 4), "b": nn.Linear(16, 4)})
        model.forward = lambda batch: (model["a"](batch[0]), model["b"](batch[1]))
        x, y = torch.randn(8, 16), torch.randn(8, 16)
        modifier = QuantizationModifier(scheme="W4A16", group_size=16, scale_search="hessian", **arguments)
        return calibrate(model, modifier, [(x, x), (x, y)])

    with pytest.raises(ValueError, match="received the same input tensor as.*share_inputs=False"):
        run()
    assert [row.module for row in run(share_inputs=False)] == ["a", "b"]


@pytest.mark.parametrize("observer", ["minmax", "moving_average", "mse", "percentile", "histogram"])
def test_nan_in_activations_names_module_and_batch(observer):
    data = batches(2)
    data[1][0, 3, 5] = torch.nan
    with pytest.raises(ValueError, match=r"'q': its input 1 \(counted from 0\) holds NaN or Inf"):
        calibrate(attention(), QuantizationModifier(scheme="FP8", observer=observer), data)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheme": "W4A16", "scale_search": "hessain"}, "scale_search"),
        ({"scheme": "W4A16", "observer": "quantile"}, "observer"),
        ({"scheme": "W4A16", "averaging_constant": 0}, "averaging_constant"),
        ({"scheme": "W4A16", "schem": 1}, "schem"),
        ({"scheme": "W4A17"}, "did you mean"),
    ],
)
def test_arguments_that_do_not_work(arguments, message):
    with pytest.raises(ValueError, match=message):
        QuantizationModifier(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheme": "W4A16", "targets": ["Lin"]}, "matches none of the model's 5 modules; did you mean 'Linear'"),
        ({"scheme": "W4A16", "ignore": ["Linear"]}, "leaves nothing"),
        ({"scheme": "W4A16"}, "group_size=128 is larger than the input columns of 'q'"),
        ({"scheme": "W4A16", "ignore": "re:)"}, r"ignore: 're:\)' is not a valid regular expression"),
    ],
)
def test_faults_come_at_initialize(arguments, message):
    with pytest.raises(ValueError, match=message):
        Lifecycle([QuantizationModifier(**arguments)]).initialize(State(model=attention()))


def test_two_modifiers_on_one_module():
    modifiers = [
        QuantizationModifier(scheme="W4A16", group_size=16),
        QuantizationModifier(scheme="W8A8", targets=["o"]),
    ]
    with pytest.raises(ValueError, match="two modifiers of the recipe quantize 'o'"):
        calibrate(attention(), modifiers, [])


def test_quantizing_twice():
    model = attention()
    calibrate(model, QuantizationModifier(scheme="W8A8"), [])
    with pytest.raises(ValueError, match="the model is quantized already, in 'q', 'k', 'v', 'o', 'spare'"):
        calibrate(model, QuantizationModifier(scheme="W8A8"), [])


def test_training_that_diverged_after_initialize_is_seen():
    model = attention()
    lifecycle = Lifecycle([QuantizationModifier(scheme="W8A8")])
    lifecycle.initialize(State(model=model))
    model.o.weight.data[0, 0] = torch.nan
    from lightning_compress.core import Event, EventType

    with pytest.raises(ValueError, match="the weight of 'o' holds NaN or Inf; did training diverge"):
        lifecycle.emit(State(model=model), Event(EventType.CALIBRATION_START))


def test_nothing_is_warned_of_when_all_is_well():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(attention(), QuantizationModifier(scheme="W8A8"), batches(1))


def test_args_are_those_of_compressed_tensors():
    model = attention()
    calibrate(model, QuantizationModifier(config_groups=groups(num_bits=3, group_size=16)), [])
    assert Quantized.of(model.q).scheme.weights == QuantizationArgs(num_bits=3, group_size=16)
    assert as_matrix(model.q).dtype == torch.float32
