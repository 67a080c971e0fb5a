import warnings

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme
from torch import nn

from lightning_compress.quant.record import Quantized
from lightning_compress.quant.schemes import assign, describe, from_groups, from_presets, group_fits, presets


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)
        self.conv, self.norm, self.head = nn.Conv2d(4, 8, 3), nn.LayerNorm(64), nn.Linear(64, 10)


W = {"num_bits": 4, "group_size": 32}


def test_a_preset_is_that_of_compressed_tensors():
    assert from_presets("w4a16", ["Linear"]) == [preset_name_to_scheme("W4A16", ["Linear"])]


def test_group_size_takes_the_place_of_the_presets():
    (scheme,) = from_presets("W4A16_ASYM", ["Linear"], 32)
    assert (scheme.weights.group_size, scheme.weights.strategy, scheme.weights.symmetric) == (32, "group", False)
    (scheme,) = from_presets("W4A16", ["Linear"], -1)
    assert (scheme.weights.group_size, scheme.weights.strategy) == (None, "channel")
    assert from_presets("W4A16", ["Linear"])[0].weights.group_size == 128  # the preset itself is untouched


def test_presets_by_target():
    first, second = from_presets({"W4A16": "Linear", "W8A8": ["re:.*down"]}, ["ignored"])
    assert (first.targets, second.targets) == (["Linear"], ["re:.*down"])


def test_groups_in_both_forms_of_compressed_tensors():
    groups = {
        "a": {"targets": "Linear", "weights": W},
        "FP8_DYNAMIC": ["head"],
        "c": QuantizationScheme(targets=["up"], weights=QuantizationArgs(num_bits=8, strategy="channel")),
    }
    a, b, c = from_groups(groups)
    assert (a.weights.num_bits, a.weights.strategy, a.targets) == (4, "group", ["Linear"])
    assert b == preset_name_to_scheme("FP8_DYNAMIC", ["head"])
    assert c == groups["c"]


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
    ("name", "text"),
    [
        ("W4A16", "W4A16 g128 sym"),
        ("W4A16_ASYM", "W4A16 g128 asym"),
        ("W8A8", "W8A8 channel sym"),
        ("FP8", "FP8 tensor static"),
        ("FP8_DYNAMIC", "FP8 channel"),
        ("W4AFP8", "W4Afp8 g128 sym"),
        ("NVFP4", "NVFP4A4 g16"),
        ("NVFP4A16", "NVFP4A16 g16"),
        ("MXFP6A8", "MXFP6A8 g32"),
        ("FP8_BLOCK", "FP8 128x128"),
    ],
)
def test_describe(name, text):
    assert describe(preset_name_to_scheme(name, ["Linear"])) == text


def test_presets_that_work_are_listed():
    assert {"W4A16", "W8A16", "W8A8", "W4A16_ASYM", "FP8", "FP8_DYNAMIC", "W2A16"} <= set(presets())
    assert {"NVFP4", "NVFP4A16", "MXFP4", "MXFP6A8", "MXFP8", "FP8_BLOCK"} <= set(presets())
    assert "UNQUANTIZED" not in presets()


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("W4A61", r"unknown scheme 'W4A61'; did you mean W4A16"),
        ("int5", r"unknown scheme 'int5'; "),
        ("W16A16", "16 bits is no quantization"),
        ("UNQUANTIZED", "it quantizes no weights"),
        ({}, "holds no preset"),
    ],
)
def test_presets_that_do_not_work(scheme, message):
    with pytest.raises(ValueError, match=message):
        from_presets(scheme, ["Linear"])


@pytest.mark.parametrize(
    ("preset", "size", "message"),
    [("W4A16", 0, "group_size=0 must be positive, or -1"), ("FP8", 32, "does not apply to 'FP8'")],
)
def test_group_sizes_that_do_not_work(preset, size, message):
    with pytest.raises(ValueError, match=message):
        from_presets(preset, ["Linear"], size)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"targets": ["Linear"], "wieghts": W}, r"config_groups\['g'\]: unknown key 'wieghts'; did you mean weights"),
        ({"targets": ["Linear"], "weights": {"num_bit": 4}}, r"\['g'\]\.weights: unknown key 'num_bit'; did you mean"),
        ({"weights": W}, "targets is missing"),
        ({"targets": [], "weights": W}, "targets is empty"),
        ({"targets": ["Linear"]}, "it quantizes no weights"),
        ({"targets": ["Linear"], "weights": 4}, r"\.weights must be a mapping such as"),
        (7, "must be a mapping with targets and weights"),
        (["Linear"], "unknown scheme 'g'"),
        ({"targets": ["Linear"], "weights": {"num_bits": 0}}, r"weights: num_bits=0 is outside of 2\.\.8"),
        ({"targets": ["Linear"], "weights": {"num_bits": 9}}, r"num_bits=9 is outside of 2\.\.8"),
        ({"targets": ["Linear"], "weights": {"num_bits": 17}}, r"num_bits=17 is outside of 2\.\.8"),
        ({"targets": ["Linear"], "weights": {"num_bits": 16}}, "num_bits=16 is no quantization"),
        ({"targets": ["Linear"], "weights": {"num_bits": "four"}}, r"\.weights: num_bits: "),
        ({"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": -5}}, "Invalid group size -5"),
        ({"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "group"}}, "requires group_size"),
        ({"targets": ["Linear"], "weights": {**W, "actorder": "group"}}, "0.20 dropped it with its weight_g_idx"),
        ({"targets": ["Linear"], "weights": {**W, "dynamic": True}}, "dynamic applies to activations"),
        ({"targets": ["Linear"], "weights": W, "output_activations": {"num_bits": 8}}, "not supported"),
        ({"targets": ["Linear"], "weights": W, "input_activations": {"num_bits": 1}}, "num_bits=1 is"),
        ({"targets": ["Linear"], "weights": {**W, "type": "float"}}, r"expected FP8 .* NVFP4 .* or MXFP4, 6, 8"),
        (
            {"targets": ["Linear"], "weights": {**W, "scale_dtype": torch.uint8}},
            "scale_dtype=torch.uint8 belongs to float formats",
        ),
        (
            {"targets": ["Linear"], "weights": {"strategy": "block", "block_structure": [8, 8]}},
            "strategy 'block' is not supported for int; use one of tensor, channel, group",
        ),
        (
            {"targets": ["Linear"], "weights": W, "input_activations": {"num_bits": 8, "group_size": 8}},
            "static ones are per tensor, got strategy 'group'",
        ),
        ({"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "symmetric": False}}, "8-bit float"),
    ],
)  # fmt: skip
def test_groups_that_do_not_work(group, message):
    with pytest.raises(ValueError, match=message):
        from_groups({"g": group})


def test_empty_groups():
    with pytest.raises(ValueError, match="config_groups is empty"):
        from_groups({})


@pytest.mark.parametrize(
    ("targets", "ignore", "message"),
    [
        (["Linaer"], [], r"targets=\['Linaer'\] matches none of the model's 5 modules; did you mean 'Linear'"),
        (["Linear"], ["re:.*"], r"ignore=\['re:\.\*'\] leaves nothing of the 3 modules"),
        (["re:[a"], [], r"targets: 're:\[a' is no regular expression"),
        (["Linear"], ["re:(b"], r"ignore: 're:\(b' is no regular expression"),
        (["Linear", "LayerNorm"], [], r"cannot quantize 'norm' \(LayerNorm\): expected Linear, Conv1d, Conv2d"),
    ],
)
def test_targets_that_do_not_work(targets, ignore, message):
    with pytest.raises(ValueError, match=message):
        assign(Model(), from_presets("W4A16", targets, 32), ignore)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (
            48,
            r"group_size=48 does not divide the input columns of 'up' \(64\), 'head' \(64\); use group_size=32, ",
        ),
        (
            128,
            r"group_size=128 is larger than the input columns of 'up' \(64\), 'down' \(96\), .*use group_size=32",
        ),
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


def test_auto_leaves_presets_without_groups_as_they_are():
    for name in ("W8A8", "NVFP4A16", "FP8_BLOCK", "MXFP4A16"):
        assert from_presets(name, ["Linear"], "auto") == from_presets(name, ["Linear"])


@pytest.mark.parametrize("size", [0, -2, [], [64, 0], ["64"], [True]])
def test_what_is_no_group_size(size):
    with pytest.raises(ValueError, match="must be positive, or -1 for one scale per row; or 'auto'; or a list"):
        from_presets("W4A16", ["Linear"], size)
    if size != [] and not isinstance(size, int):
        with pytest.raises(ValueError, match=r"config_groups\['g'\]: group_size=.* must be positive"):
            from_groups({"g": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": size}}})


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"group_size": "outo"}, "group_size='outo', expected a number, a list of numbers or 'auto'"),
        ({"group_size": "auto", "strategy": "channel"}, "group_size='auto' needs type: int and strategy: group"),
        ({"group_size": "auto", "type": "float"}, "group_size='auto' needs type: int and strategy: group"),
    ],
)
def test_group_sizes_that_a_group_cannot_have(weights, message):
    with pytest.raises(ValueError, match=message):
        from_groups({"g": {"targets": ["Linear"], "weights": {"num_bits": 4, **weights}}})


def test_a_pattern_means_the_layers_inside_of_what_it_matches():
    attention = nn.ModuleDict({"q": nn.Linear(32, 32), "norm": nn.LayerNorm(32), "act": nn.ReLU()})
    model = nn.ModuleDict({"attn": attention, "mlp": nn.ModuleDict({"up": nn.Linear(32, 8)})})
    assert list(assign(model, from_presets("W4A16", ["re:.*attn.*"], 32), [])) == ["attn.q"]
    with pytest.raises(ValueError, match=r"targets='re:mlp\$' matches 'mlp' \(ModuleDict\), which hold no matrix of"):
        assign(model, from_presets("W4A16", ["re:mlp$", "Linear"], 32), [])
    model["attn"]["lstm"] = nn.LSTM(32, 8)
    with pytest.raises(ValueError, match=r"cannot quantize 'attn.lstm' \(LSTM\)"):  # nothing silently
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
