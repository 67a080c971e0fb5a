"""The callback's arguments: types and ranges, and what a recipe sets."""

import re

import pytest

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
