"""SmoothQuant and logarithmic equalization: formulas, a model that computes what it did, better W8A8 with outliers."""

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
from lightning_compress.modifiers.smoothing.logarithmic_equalization import equalizing_scale
from lightning_compress.modifiers.smoothing.smoothquant import smoothing_scale
from tests.support.smoothing_models import NAMES, C, batches, build, change, ignore, output, planted, targets
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
def test_the_model_computes_what_it_did(modifier, name):
    model, dense, ledger = smoothed(name, modifier)
    assert change(model, dense, batches(name, seed=5)) < 1e-5
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, dense.get_parameter(n))]
    assert changed
    done = [row for row in ledger if not row.flags]
    assert done
    assert {row.module + ".weight" for row in done} <= set(changed)
    assert all(row.tokens for row in done)


def test_the_scales_are_those_of_the_paper():
    data = batches("relu")
    model, dense, _ = smoothed("relu", smoothing_strength=0.75)
    seen = []
    handle = dense[0].fc1.register_forward_pre_hook(lambda _m, args: seen.append(args[0].reshape(-1, C)))
    for batch in data:
        output(dense, batch)
    handle.remove()
    x, w = torch.cat(seen).abs().amax(0), dense[0].fc1.weight.detach().abs().amax(0)
    s = x**0.75 / w**0.25
    assert torch.allclose(dense[0].norm.weight / s, model[0].norm.weight, rtol=1e-4)
    assert torch.allclose(dense[0].norm.bias / s, model[0].norm.bias, rtol=1e-4)


def test_layers_of_one_source_share_the_scale_of_all_their_weights():
    model, dense, _ = smoothed("llama")
    layer, before = model.model.layers[0], dense.model.layers[0]
    s = before.input_layernorm.weight / layer.input_layernorm.weight
    for name in ("q_proj", "k_proj", "v_proj"):
        W, W_before = (m.self_attn.get_submodule(name).weight for m in (layer, before))
        factor = W / W_before
        if name == "v_proj":  # a source itself: rows are divided
            factor = factor / factor[:, :1] * s[0]
        assert torch.allclose(factor, s.expand_as(W), rtol=1e-3)


def test_padding_counts_for_nothing():
    data = batches("llama")
    padded = copy.deepcopy(data)
    padded[1]["input_ids"][0, :3] = 40  # behind the mask
    weights = [smoothed("llama", data=d)[0].model.layers[0].input_layernorm.weight for d in (data, padded)]
    assert torch.allclose(*weights, rtol=1e-6)


def test_formulas():
    x, w = torch.tensor([4.0, 9.0, 0.0, 5.0]), torch.tensor([1.0, 4.0, 2.0, 0.0])
    assert torch.allclose(smoothing_scale(x, w, 0.5), torch.tensor([2.0, 1.5, 1.0, 1.0]))
    assert torch.allclose(smoothing_scale(x, w, 1.0), torch.tensor([4.0, 9.0, 1.0, 1.0]))
    assert torch.allclose(smoothing_scale(x, w, 0.0), torch.tensor([1.0, 0.25, 1.0, 1.0]))
    assert torch.allclose(equalizing_scale(torch.tensor([2.0, 14.0, 0.0])), torch.tensor([1.0, 3.5, 1.0]))


@pytest.mark.parametrize("modifier", SMOOTHERS)
@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_with_outlier_channels_w8a8_gets_better(name, modifier):
    """Held-out batches; outliers planted in what norms give, so that the dense model computes what it did."""
    data, held_out = batches(name), batches(name, count=4, seed=9)
    dense = planted(build(name), data[0])
    arguments = {"targets": targets(name), "ignore": ignore(dense)}
    plain, smooth = copy.deepcopy(dense), copy.deepcopy(dense)
    compress(plain, QuantizationModifier(scheme="W8A8", **arguments), data)
    compress(smooth, [modifier(**arguments), QuantizationModifier(scheme="W8A8", **arguments)], data)
    assert change(smooth, dense, held_out) < 0.7 * change(plain, dense, held_out)


def test_a_quantizer_behind_it_sees_the_smoothed_inputs():
    """Its statistics come from the folded block, in the one pass that it walks."""
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
    found = [smoothed("llama", mappings=m) for m in (by_dict, by_list)]
    for (_, p), (_, q) in zip(*(model.named_parameters() for model, _, _ in found), strict=True):
        assert torch.equal(p, q)
    model, dense, ledger = found[0]
    layer, before = model.model.layers[1], dense.model.layers[1]
    assert not torch.equal(layer.self_attn.q_proj.weight, before.self_attn.q_proj.weight)
    assert torch.equal(layer.mlp.up_proj.weight, before.mlp.up_proj.weight)
    flags = {row.module.rsplit(".", 1)[1]: row.flags for row in ledger}
    assert flags["o_proj"] == ["no smoothing pair; left as it was"]
    assert flags["q_proj"] == []


def test_what_has_no_pair_is_said():
    model = nn.Sequential(nn.Linear(C, C), nn.GELU(), nn.Linear(C, C))
    before = copy.deepcopy(model.state_dict())
    told = "no norm or linear layer is the only thing that feeds one of '0', '2'; nothing was changed"
    with pytest.warns(UserWarning, match=told):
        ledger = compress(model, SmoothQuantModifier(), batches("flat"))
    assert [row.flags for row in ledger] == [["no smoothing pair; left as it was"]] * 2
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(("arguments", "message"), [
    ({"smoothing_strength": 1.5}, "smoothing_strength=1.5"),
    ({"smoothing_strenght": 0.5}, "did you mean 'smoothing_strength'"),
    ({"mappings": []}, "mappings is empty"),
    ({"mappings": ["fc1"]}, r"mappings\[0\]='fc1': expected"),
])  # fmt: skip
def test_arguments_that_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SmoothQuantModifier(**arguments)


def test_what_is_told_before_any_data_is_read():
    model = build("gelu")
    with pytest.raises(ValueError, match=r"mappings\[0\]: 're:.\*fc3' matches none"):
        compress(model, SmoothQuantModifier(mappings=[["re:.*fc3", "re:.*norm"]]), batches("gelu"))
    with pytest.raises(ValueError, match="cannot smooth the inputs of .*LayerNorm"):
        compress(model, SmoothQuantModifier(targets=["LayerNorm"]), batches("gelu"))
    with pytest.raises(ValueError, match="needs calibration data"):
        compress(model, SmoothQuantModifier())


def test_not_after_what_quantizes():
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
