"""Schemes from what the user wrote, and what is refused."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme

from lightning_compress.quant.schemes import describe, from_groups, from_presets, presets

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


@pytest.mark.parametrize(("name", "symmetric"), [("INT8_STATIC", False), ("int8_static_sym", True)])
def test_static_presets_are_what_integer_kernels_multiply(name, symmetric):
    (scheme,) = from_presets(name, ["Linear", "Conv2d"])
    weights, inputs = scheme.weights, scheme.input_activations
    assert (weights.num_bits, weights.type, weights.symmetric, weights.strategy) == (8, "int", True, "channel")
    assert (inputs.num_bits, inputs.type, inputs.symmetric, inputs.strategy) == (8, "int", symmetric, "tensor")
    assert inputs.dynamic is False
    assert scheme.targets == ["Linear", "Conv2d"]
    scheme.weights.num_bits = 4  # a scheme is no view of the preset
    assert from_presets(name, ["Linear"])[0].weights.num_bits == 8


def test_presets_that_work_are_listed():
    assert {"W4A16", "W8A16", "W8A8", "W4A16_ASYM", "FP8", "FP8_DYNAMIC", "W2A16"} <= set(presets())
    assert {"NVFP4", "NVFP4A16", "MXFP4", "MXFP6A8", "MXFP8", "FP8_BLOCK"} <= set(presets())
    assert "UNQUANTIZED" not in presets()


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("W4A61", r"unknown scheme 'W4A61'; did you mean W4A16"),
        ("int5", r"unknown scheme 'int5'; "),
        ("W16A16", "16 bits is not a quantization"),
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
        ({"targets": ["Linear"], "weights": {"num_bits": 16}}, "num_bits=16 is not a quantization"),
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
