"""Which scheme each module of a model gets, and what is refused."""

import warnings

import pytest
import torch
from compressed_tensors.quantization import QuantizationScheme
from torch import nn

from lightning_compress.quant.assignment import assign, group_fits
from lightning_compress.quant.record import Quantized
from lightning_compress.quant.schemes import describe, from_groups, from_presets


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)
        self.conv, self.norm, self.head = nn.Conv2d(4, 8, 3), nn.LayerNorm(64), nn.Linear(64, 10)


def test_exact_name_beats_pattern_beats_class_and_the_first_wins_a_tie():
    names = ["W4A16", "W3A16", "W2A16", "W8A16"]
    order = dict(zip(names, (["Linear"], ["re:down|up"], ["down"], ["re:.*up"]), strict=True))
    chosen = assign(
        Model(), from_presets(order, []) and [s for n, t in order.items() for s in from_presets(n, t, 32)], []
    )
    assert {n: s.weights.num_bits for n, s in chosen.items()} == {"up": 3, "down": 2, "head": 4}


def test_ignored_modules_have_no_scheme():
    assert list(assign(Model(), from_presets("W4A16", ["Linear"], 32), ["re:he", "up"])) == ["down"]


def test_convolutions_and_their_columns():
    chosen = assign(Model(), from_presets("W4A16", ["Conv2d"], 12), [])  # 4 * 3 * 3 = 36 columns
    assert list(chosen) == ["conv"]


@pytest.mark.parametrize(
    ("targets", "ignore", "message"),
    [
        (["Linaer"], [], r"targets=\['Linaer'\] matches none of the model's 5 modules; did you mean 'Linear'"),
        (["Linear"], ["re:.*"], r"ignore=\['re:\.\*'\] leaves nothing of the 3 modules"),
        (["re:[a"], [], r"targets: 're:\[a' is not a valid regular expression"),
        (["Linear"], ["re:(b"], r"ignore: 're:\(b' is not a valid regular expression"),
        (["Linear", "LayerNorm"], [], r"cannot quantize 'norm' \(LayerNorm\): expected Linear, Conv1d, Conv2d"),
    ],
)
def test_targets_that_do_not_work(targets, ignore, message):
    with pytest.raises(ValueError, match=message):
        assign(Model(), from_presets("W4A16", targets, 32), ignore)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (48, r"group_size=48 does not divide the input columns of 'up' \(64\), 'head' \(64\); use group_size=32, "),
        (128, r"group_size=128 is larger than the input columns of 'up' \(64\), 'down' \(96\), .*use group_size=32"),
    ],
)
def test_groups_that_do_not_divide(size, message):
    with pytest.raises(ValueError, match=message):
        assign(Model(), from_presets("W4A16", ["Linear"], size), [])


def test_columns_without_a_common_divisor():
    model = nn.Sequential(nn.Linear(7, 3), nn.Linear(5, 3))
    with pytest.raises(ValueError, match=r"use group_size=-1 \(one scale per row\), .* or add them to ignore"):
        assign(model, from_presets("W4A16", ["Linear"]), [])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_not_finite(bad):
    model = Model()
    model.down.weight.data[3, 4] = bad
    with pytest.raises(ValueError, match="the weight of 'down' holds NaN or Inf"):
        assign(model, from_presets("W4A16", ["Linear"], 32), [])


def test_weights_whose_sum_overflows_are_fine():
    model = Model()
    model.down.weight.data.fill_(3e38)
    assign(model, from_presets("W4A16", ["Linear"], 32), [])


def test_a_shared_weight():
    model = nn.ModuleDict(
        {"embed": nn.Embedding(10, 64), "head": nn.Linear(64, 10, bias=False), "mid": nn.Linear(64, 64)}
    )
    model["head"].weight = model["embed"].weight
    with pytest.raises(
        ValueError, match=r"the weight of 'head' is shared with 'embed\.weight', .* add 'head' to ignore"
    ):
        assign(model, from_presets("W4A16", ["Linear"], 32), [])
    assert list(assign(model, from_presets("W4A16", ["Linear"], 32), ["head"])) == ["mid"]


def test_a_model_that_is_quantized_already():
    schemes = from_presets("W4A16", ["Linear"], 32)
    ours, theirs, loaded = Model(), Model(), Model()
    Quantized(schemes[0], torch.ones(96, 2)).attach(ours.up)
    theirs.head.quantization_scheme = schemes[0]
    loaded.config = type("Config", (), {"quantization_config": {"quant_method": "compressed-tensors"}})()
    for model, where in ((ours, "in 'up'"), (theirs, "in 'head'"), (loaded, "compressed-tensors")):
        with pytest.raises(ValueError, match=f"the model is quantized already.*{where}.*start from the dense model"):
            assign(model, schemes, [])


@pytest.mark.parametrize(
    ("columns", "asked", "advice"),
    [
        (576, 128, "group_size=64"),
        (96, 64, "group_size=32"),
        (784, 128, "group_size=16"),
        (36, 32, "group_size=-1"),
        (30, 128, "group_size=-1"),
        (7, 4, "group_size=-1"),
    ],
)
def test_the_size_that_is_suggested_lies_near_the_one_asked_for(columns, asked, advice):
    (scheme,) = from_presets("W4A16", ["Linear"], asked)
    with pytest.raises(ValueError, match=f"use {advice}"):
        group_fits({"a": columns}, scheme)


def test_auto_gives_each_module_the_largest_usual_size_that_divides_its_columns():
    model = nn.ModuleDict({str(n): nn.Linear(n, 2) for n in (256, 192, 576, 160, 784, 30)})
    assigned = assign(model, from_presets("W4A16", ["Linear"], "auto"), [])
    assert {name: describe(scheme) for name, scheme in assigned.items()} == {
        "256": "W4A16 g128 sym", "192": "W4A16 g64 sym", "576": "W4A16 g64 sym", "160": "W4A16 g32 sym",
        "784": "W4A16 channel sym", "30": "W4A16 channel sym",
    }  # fmt: skip
    assert assigned["192"] is assigned["576"]  # one object, so that exports write one group
    assert type(assigned["256"]) is QuantizationScheme


def test_sizes_of_the_users_and_inside_of_groups():
    model = nn.ModuleDict({str(n): nn.Linear(n, 2) for n in (256, 48, 30)})
    weights = {"num_bits": 3, "symmetric": False, "strategy": "group", "group_size": [64, 16, -1], "actorder": "static"}
    (scheme,) = from_groups({"w3": {"targets": ["Linear"], "weights": weights}})
    assert describe(scheme) == "W3A16 g64/g16/channel asym"
    assert [describe(s) for s in assign(model, [scheme], []).values()] == [
        "W3A16 g64 asym", "W3A16 g16 asym", "W3A16 channel asym"
    ]  # fmt: skip
    (scheme,) = from_presets("W4A16", ["Linear"], [64, 16])
    with pytest.raises(ValueError, match=r"group_size=64 is larger than .* of '30' \(30\); use group_size=-1"):
        assign(model, [scheme], [])


def test_a_pattern_means_the_layers_inside_of_what_it_matches():
    attention = nn.ModuleDict({"q": nn.Linear(32, 32), "norm": nn.LayerNorm(32), "act": nn.ReLU()})
    model = nn.ModuleDict({"attn": attention, "mlp": nn.ModuleDict({"up": nn.Linear(32, 8)})})
    assert list(assign(model, from_presets("W4A16", ["re:.*attn.*"], 32), [])) == ["attn.q"]
    with pytest.raises(ValueError, match=r"targets='re:mlp\$' matches 'mlp' \(ModuleDict\), which hold no matrix of"):
        assign(model, from_presets("W4A16", ["re:mlp$", "Linear"], 32), [])
    model["attn"]["lstm"] = nn.LSTM(32, 32)
    reached = ["attn.q", "attn.lstm.ih_l0", "attn.lstm.hh_l0"]
    assert list(assign(model, from_presets("W4A16", ["re:.*attn.*"], 32), [])) == reached
    model["attn"]["pair"] = nn.Bilinear(32, 8, 8)
    with pytest.raises(ValueError, match=r"cannot quantize 'attn.pair' \(Bilinear\)"):  # nothing silently
        assign(model, from_presets("W4A16", ["re:.*attn.*"], 32), [])


def test_formats_of_one_group_size_say_so():
    (scheme,) = from_presets("NVFP4A16", ["Linear"])
    with pytest.raises(ValueError, match=r"group_size=16 does not divide .* the format knows no other size"):
        group_fits({"a": 40}, scheme)
    (scheme,) = from_presets("FP8_BLOCK", ["Linear"])
    with pytest.raises(ValueError, match=r"input_activations: group_size=128 is larger than the input columns of 'a'"):
        group_fits({"a": 64}, scheme)


def test_a_weight_that_a_parametrization_computes_says_how_to_merge_it():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    with pytest.raises(ValueError, match=r"cannot quantize '0' .*merge it first .*remove_parametrizations"):
        assign(model, from_presets("W4A16", ["Linear"], 8), [])


def test_the_advice_for_a_shared_weight_works():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="add '0' and '1' to ignore"):
        assign(model, from_presets("W4A16", ["Linear"], 8), [])
    assert list(assign(model, from_presets("W4A16", ["Linear"], 8), ["0", "1"])) == ["2"]


def test_inputs_that_no_hook_will_see_are_named():
    model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
    with pytest.warns(UserWarning, match=r"the inputs of '0\.out_proj' will stay as they are"):
        assign(model, from_presets("W8A8", ["Linear"]), [])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assign(model, from_presets("W8A16", ["Linear"], 8), ["MultiheadAttention"])  # weights alone


@pytest.mark.parametrize("name", ["NVFP4", "MXFP4", "MXFP8"])
def test_groups_along_the_width_of_an_image_are_refused(name):
    net, targets = nn.Sequential(nn.Conv2d(32, 8, 1), nn.Linear(32, 8)), ["Conv2d", "Linear"]
    message = r"input_activations: groups of columns do not exist in the inputs of '0'; convolutions take one"
    with pytest.raises(ValueError, match=message):
        assign(net, from_presets(name, targets), [])
    assert list(assign(net, from_presets(name, ["Linear"]), ["0"])) == ["1"]
    assert list(assign(net, from_presets(f"{name}A16" if name != "MXFP8" else "MXFP8A16", targets), [])) == ["0", "1"]
