"""SmoothQuant and logarithmic equalization: the model computes the same, outliers become harmless, refusals."""

import copy

import pytest
import torch
from torch import nn

from lightning_compress import (
    GPTQModifier,
    LogarithmicEqualizationModifier,
    QATModifier,
    QuantizationModifier,
    SmoothQuantModifier,
    compress,
)
from tests.support.smoothing_models import NAMES, C, batches, build, change, ignore, planted, targets
from tests.support.training_loop import network, train

SMOOTHERS = [SmoothQuantModifier, LogarithmicEqualizationModifier]


def smoothed(name, modifier=SmoothQuantModifier, data=None, **arguments):
    model = build(name)
    dense = copy.deepcopy(model)
    arguments = {"targets": targets(name), "ignore": ignore(model)} | arguments
    ledger = compress(model, modifier(**arguments), batches(name) if data is None else data)
    return model, dense, ledger


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("modifier", SMOOTHERS)
def test_the_model_computes_the_same(modifier, name):
    model, dense, ledger = smoothed(name, modifier)
    assert change(model, dense, batches(name, seed=5)) < 1e-5
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, dense.get_parameter(n))]
    assert changed
    smoothed_rows = [row for row in ledger if not row.flags]
    assert smoothed_rows
    assert {row.module + ".weight" for row in smoothed_rows} <= set(changed)
    assert all(row.tokens for row in smoothed_rows)


def test_padding_counts_for_nothing():
    data = batches("llama")
    padded = copy.deepcopy(data)
    padded[1]["input_ids"][0, :3] = 40  # behind the mask
    weights = [smoothed("llama", data=d)[0].model.layers[0].input_layernorm.weight for d in (data, padded)]
    assert torch.allclose(*weights, rtol=1e-6)


@pytest.mark.parametrize("modifier", SMOOTHERS)
@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_with_outlier_channels_w8a8_gets_better(name, modifier):
    """On held-out batches; outliers are planted in the outputs of norms, so that the dense model computes the same."""
    data, held_out = batches(name), batches(name, count=4, seed=9)
    dense = planted(build(name), data[0])
    arguments = {"targets": targets(name), "ignore": ignore(dense)}
    plain, smooth = copy.deepcopy(dense), copy.deepcopy(dense)
    compress(plain, QuantizationModifier(scheme="W8A8", **arguments), data)
    compress(smooth, [modifier(**arguments), QuantizationModifier(scheme="W8A8", **arguments)], data)
    assert change(smooth, dense, held_out) < 0.7 * change(plain, dense, held_out)


def test_a_quantizer_behind_it_sees_the_smoothed_inputs():
    """Its statistics come from the folded block, in one pass or two."""
    data = batches("relu")
    chained, apart, two_passes = (build("relu") for _ in range(3))
    gptq = {"scheme": "W4A16", "group_size": 16}
    compress(chained, [SmoothQuantModifier(), GPTQModifier(**gptq)], data)
    compress(two_passes, [SmoothQuantModifier(), GPTQModifier(**gptq)], data, walk="two_pass")
    assert torch.allclose(chained[0].fc1.weight, two_passes[0].fc1.weight, atol=1e-5)
    compress(apart[0], SmoothQuantModifier(), data)
    compress(apart[0], GPTQModifier(**gptq), data)
    assert torch.allclose(chained[0].fc1.weight, apart[0].fc1.weight, atol=1e-5)
    assert torch.allclose(chained[0].fc2.weight, apart[0].fc2.weight, atol=1e-5)


def test_by_hand_in_both_notations():
    by_dict = [{"smooth_layer": "re:.*input_layernorm", "balance_layers": ["re:.*[qkv]_proj"]}]
    by_list = [[["re:.*[qkv]_proj"], "re:.*input_layernorm"]]
    runs = [smoothed("llama", mappings=m) for m in (by_dict, by_list)]
    for (_, p), (_, q) in zip(*(model.named_parameters() for model, _, _ in runs), strict=True):
        assert torch.equal(p, q)
    model, dense, ledger = runs[0]
    layer, before = model.model.layers[1], dense.model.layers[1]
    assert not torch.equal(layer.self_attn.q_proj.weight, before.self_attn.q_proj.weight)
    assert torch.equal(layer.mlp.up_proj.weight, before.mlp.up_proj.weight)
    flags = {row.module.rsplit(".", 1)[1]: row.flags for row in ledger}
    assert flags["o_proj"] == ["no smoothing pair; left as it was"]
    assert flags["q_proj"] == []


def test_a_model_without_pairs_is_left_as_it_was_with_a_warning():
    model = nn.Sequential(nn.Linear(C, C), nn.GELU(), nn.Linear(C, C))
    before = copy.deepcopy(model.state_dict())
    message = "no norm or linear layer is the only thing that feeds one of '0', '2'; nothing was changed"
    with pytest.warns(UserWarning, match=message):
        ledger = compress(model, SmoothQuantModifier(), batches("flat"))
    assert [row.flags for row in ledger] == [["no smoothing pair; left as it was"]] * 2
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_errors_before_any_data_is_read():
    model = build("gelu")
    with pytest.raises(ValueError, match=r"mappings\[0\]: 're:.\*fc3' matches none"):
        compress(model, SmoothQuantModifier(mappings=[["re:.*fc3", "re:.*norm"]]), batches("gelu"))
    with pytest.raises(ValueError, match="cannot smooth the inputs of .*LayerNorm"):
        compress(model, SmoothQuantModifier(targets=["LayerNorm"]), batches("gelu"))
    with pytest.raises(ValueError, match="needs calibration data"):
        compress(model, SmoothQuantModifier())


def test_a_quantized_model_is_refused():
    model = build("gelu")
    compress(model, QuantizationModifier(scheme="W8A16", group_size=-1), batches("gelu"))
    with pytest.raises(ValueError, match="'0.fc1' is quantized already: put SmoothQuantModifier before"):
        compress(model, SmoothQuantModifier(), batches("gelu"))


def test_a_pair_by_hand_that_is_not_invariant_stops_the_run():
    model = build("gelu")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="a smoothing pair that is not invariant: '0.fc1' -> .'0.fc2'."):
        compress(model, SmoothQuantModifier(mappings=[["re:.*fc2", "re:.*fc1"]]), batches("gelu"))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_beside_quantization_that_trains_it_is_refused_in_the_first_batch():
    model = network()
    modifiers = [SmoothQuantModifier(), QATModifier(scheme="W8A8")]
    with pytest.raises(ValueError, match="SmoothQuantModifier scales weights after training, .* trains '0' on a grid"):
        train(model, modifiers, 1)
