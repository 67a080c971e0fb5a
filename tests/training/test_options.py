"""The callback's arguments: types and ranges, and what a recipe sets."""

import inspect
import re
from dataclasses import fields

import pytest

from lightning_compress import CompressionCallback, compress
from lightning_compress.calibration.options import CalibrationOptions
from lightning_compress.training.options import CallbackOptions
from tests.support.training_runs import rounding

WRONG = [
    ("calibration_batches", 2.5, "is a float, expected a whole number"),
    ("calibration_batches", "16", "is a str, expected a whole number"),
    ("calibration_batches", True, "is a bool, expected a whole number"),
    ("calibration_batches", None, "is a NoneType, expected a whole number"),
    ("calibration_batches", 0, "expected at least 1"),
    ("eval_batches", 1.5, "is a float, expected a whole number"),
    ("eval_batches", 0, "expected at least 1"),
    ("seed", True, "is a bool, expected a whole number"),
    ("seed", "x", "is a str, expected a whole number"),
    ("seed", -1, "expected at least 0"),
    ("seed", 2**63, "less than 2"),
    ("evaluate", "no", "is a str, expected True or False"),
    ("load_best", 1, "is a int, expected True or False"),
    ("moe_calibrate_all_experts", None, "is a NoneType, expected True or False"),
    ("export_dir", 3, "is a int, expected a path"),
    ("walk", "slow", "expected 'auto'"),
    ("offload_device", "gpu", "expected a device such as"),
    ("offload_device", "meta", "expected a device such as"),
]


@pytest.mark.parametrize(("argument", "value", "message"), WRONG)
def test_arguments_of_a_wrong_type_are_refused_at_once(argument, value, message):
    with pytest.raises(ValueError, match=rf"^{argument}={re.escape(repr(value))}.*{message}"):
        rounding(**{argument: value})


def test_verify_is_one_of_three():
    with pytest.raises(ValueError, match="verify='always': expected 'auto', True or False"):
        rounding(verify="always")


@pytest.mark.parametrize("function", [CompressionCallback, compress])
def test_a_signature_has_the_defaults_of_the_options(function):
    """Else a recipe's setting would be taken for the user's, or the other way round."""
    defaults = {field.name: field.default for field in (*fields(CalibrationOptions), *fields(CallbackOptions))}
    parameters = {name: p.default for name, p in inspect.signature(function).parameters.items() if name in defaults}
    assert parameters == {name: defaults[name] for name in parameters}
    assert {"blocks", "walk", "offload_device", "seed", "moe_calibrate_all_experts"} <= parameters.keys()


def test_a_setting_of_the_recipe_is_used_where_the_argument_has_its_default(tmp_path):
    entry = "{_target_: lightning_compress.QuantizationModifier, scheme: W8A16, group_size: -1}"
    (tmp_path / "mine.yaml").write_text(f"modifiers:\n  rtn: {entry}\nwalk: two_pass\nseed: 3\nevaluate: false\n")
    options = CompressionCallback(recipe=str(tmp_path / "mine.yaml"), seed=5).options
    assert (options.calibration.walk, options.calibration.seed, options.evaluate) == ("two_pass", 5, False)
    (tmp_path / "mine.yaml").write_text(f"modifiers:\n  rtn: {entry}\ndevice: cpu\n")
    with pytest.raises(ValueError, match=r"the recipe sets \['device'\], which CompressionCallback does not take"):
        CompressionCallback(recipe=str(tmp_path / "mine.yaml"))
