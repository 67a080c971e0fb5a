"""What quantizers on calibration data share: static activations, layers that never saw data, double claims."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lightning_compress.modifiers.gptq.modifier import GPTQModifier
from lightning_compress.modifiers.quantization import QuantizationModifier
from lightning_compress.quant.record import Quantized
from tests.support.quantization_runs import attention, batches, calibrate, inputs_of, made, weights


def test_activations_are_quantized_once_the_module_is_solved():
    model, data = attention(), batches(2)
    calibrate(model, made(scheme="W8A8", group_size=None), data)
    x = data[0]
    token = x.abs().amax(-1, keepdim=True) / 127.5
    expected = nn.functional.linear((x / token).round().clamp(-128, 127) * token, model.q.weight, model.q.bias)
    assert_close(model.q(x), expected)


def test_fp8_weights_and_static_activations():
    model, data = attention(), batches(2)
    dense, X = weights(model), inputs_of(model, data)
    ledger = calibrate(model, made(scheme="FP8", group_size=None), data)
    record = Quantized.of(model.q)
    assert_close(record.input_scale, torch.stack(data).abs().max()[None] / 448)
    assert torch.equal((model.q.weight / record.scale).to(torch.float8_e4m3fn).float() * record.scale, model.q.weight)
    scale = dense["q.weight"].abs().max() / 448
    rounded = (dense["q.weight"] / scale).to(torch.float8_e4m3fn).float() * scale
    rtn = (X["q"] @ (rounded - dense["q.weight"]).t()).square().sum() / (X["q"] @ dense["q.weight"].t()).square().sum()
    assert ledger.rows[0].error < 0.8 * rtn


def test_targets_that_never_saw_data_are_named_and_rounded():
    model = attention()
    before = model.spare.weight.detach().clone()
    with pytest.warns(UserWarning, match="spare never saw data and were rounded to nearest"):
        ledger = calibrate(model, made(ignore=[]), batches(1))
    row = ledger.rows[-1]
    assert (row.module, row.flags, row.tokens) == ("spare", ["never saw data; rounded to nearest"], 0)
    blocks = before.view(64, 4, 16)
    scale = blocks.abs().amax(-1, keepdim=True) / 7.5
    assert_close(model.spare.weight, ((blocks / scale).round().clamp(-8, 7) * scale).view(64, 64))
    assert Quantized.of(model.spare) is not None


def test_static_targets_that_never_saw_data_are_left():
    model = attention()
    with pytest.warns(UserWarning, match="left as they were"):
        ledger = calibrate(model, made(scheme="FP8", group_size=None, ignore=[]), batches(1))
    assert ledger.rows[-1].flags == ["never saw data; left as it was"]
    assert Quantized.of(model.spare) is None


def test_multihead_attention_uses_its_projection_behind_the_hooks_back():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(32, 2, batch_first=True)})
    model.forward = lambda x: model["attention"](x, x, x)
    with pytest.warns(UserWarning, match=r"attention\.out_proj never saw data .*nn.MultiheadAttention uses the weight"):
        calibrate(model, GPTQModifier(scheme="W4A16", group_size=16), [torch.randn(2, 5, 32)])


def test_two_modifiers_on_one_module():
    modifiers = [QuantizationModifier(scheme="W8A8", targets=["o"]), made()]
    with pytest.raises(ValueError, match="two modifiers of the recipe quantize 'o'"):
        calibrate(attention(), modifiers, batches(1))
