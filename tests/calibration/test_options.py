"""Options of calibration: types, values, and what goes together."""

from pathlib import Path

import pytest

from lightning_compress.calibration import calibrate
from lightning_compress.calibration.options import CalibrationOptions, check_device
from tests.support.calibration_models import C, Layered, Watcher, make_batches, seeded, started


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"walk": "twice"}, "walk='twice': expected 'auto', 'one_pass', 'two_pass', 'whole'"),
        ({"walk": "whole", "blocks": "Mixer"}, "takes the model as one block, so blocks='Mixer' has no effect"),
        ({"device": "gpu"}, "^device='gpu': expected a device such as 'cpu'"),
        ({"offload_device": "meta"}, "^offload_device='meta': expected a device such as 'cpu'"),
        ({"seed": -1}, "seed=-1: expected at least 0"),
        ({"seed": 1.0}, "seed=1.0 is a float, expected a whole number"),
        ({"cache_activations": True}, "cache_activations=True: expected 'memory', 'disk' or the path of a folder"),
        ({"moe_calibrate_all_experts": 1}, "moe_calibrate_all_experts=1 is a int, expected True or False"),
    ],
    ids=str,
)
def test_wrong_values_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        CalibrationOptions(**options)


def test_none_stands_for_the_place_where_things_are():
    options = CalibrationOptions(device=None, offload_device=None)
    check_device(options)
    assert options == CalibrationOptions(offload_device=None)


def test_disk_is_the_folder_of_the_caller_and_memory_is_none(tmp_path):
    assert CalibrationOptions(cache_activations="memory").cached_in(tmp_path).cache_folder is None
    assert CalibrationOptions(cache_activations="disk").cached_in(tmp_path).cache_folder == tmp_path
    assert CalibrationOptions(cache_activations="~/x").cached_in(tmp_path).cache_folder == Path("~/x").expanduser()


@pytest.mark.parametrize("blocks", ["Mixer", ["layers.0", "re:layers"]])
def test_the_frozen_options_compare_by_value(blocks):
    assert CalibrationOptions(blocks=blocks, walk="two_pass") == CalibrationOptions(blocks=blocks, walk="two_pass")
    with pytest.raises(AttributeError):
        CalibrationOptions().walk = "whole"


def test_one_pass_is_refused_where_a_modifier_finishes_whole_blocks():
    with pytest.raises(ValueError, match="Watcher finishes whole blocks, not single modules; use walk='two_pass'"):
        calibrate(
            *started(Watcher(), model=seeded(Layered)), make_batches(1, 2, 5, C), CalibrationOptions(walk="one_pass")
        )
