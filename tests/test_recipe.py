"""Recipes: found by name, built by name, and nothing called that a file says."""

import os
from pathlib import Path

import pytest
import yaml
from torch import nn

from lightning_compress import (
    CompressionCallback,
    GPTQModifier,
    ModifierFactory,
    QuantizationModifier,
)
from lightning_compress.quant.schemes import assign, describe, from_groups
from lightning_compress.recipe import dump_recipe, load_recipe, read_recipe, recipe_difference
from tests.training_runs import RecordingModifier

CONF = Path(__file__).parents[1] / "conf" / "compress"


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(ModifierFactory, "_registered", dict(ModifierFactory._registered))
    ModifierFactory.register("Recording", RecordingModifier)


def written(folder, text):
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


# -- where ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(p.stem for p in CONF.glob("*.yaml")))
def test_every_recipe_of_the_package_builds(name):
    entries = yaml.safe_load((CONF / f"{name}.yaml").read_text())["compress"]["modifiers"]
    assert [type(m).__name__ for m in load_recipe(name)] == [e["_target_"].rpartition(".")[2] for e in entries.values()]


def test_a_recipe_by_name():
    (modifier,) = load_recipe("gptq_w4")
    assert isinstance(modifier, GPTQModifier)
    assert modifier.scheme == "W4A16"


def test_qat_for_vision_calibrates_one_scale_for_all_inputs_of_a_convolution():
    (modifier,) = load_recipe("qat_w8a8_static")
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    for scheme in assign(net, from_groups(modifier.config_groups), modifier.ignore).values():
        assert describe(scheme) == "W8A8 channel sym static"
        assert (scheme.input_activations.strategy, scheme.input_activations.symmetric) == ("tensor", False)


def test_an_unknown_name_has_near_misses():
    with pytest.raises(ValueError, match=r"no recipe is called 'gtpq_w4'; did you mean gptq_w4"):
        load_recipe("gtpq_w4")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"recipe '.*nothing\.yaml': there is no such file"):
        load_recipe(tmp_path / "nothing.yaml")


@pytest.mark.parametrize("nested", ["{compress: %s}", "{callbacks: {compress: %s}}", "%s"])
def test_a_file_of_the_users(tmp_path, nested):
    second = "{_target_: lightning_compress.QuantizationModifier, scheme: W4A16}"
    text = nested % f"{{modifiers: {{a: {{type: Recording, start: 2}}, b: {second}}}}}"
    first, second = load_recipe(written(tmp_path, text))
    assert (type(first), first.start) == (RecordingModifier, 2)
    assert isinstance(second, QuantizationModifier)


def test_a_list_of_modifiers_keeps_its_order():
    made = load_recipe({"modifiers": [{"type": "Recording", "start": s} for s in (3, 1)]})
    assert [m.start for m in made] == [3, 1]


def test_the_callback_takes_what_else_the_recipe_sets(tmp_path):
    path = str(written(tmp_path, "compress: {calibration_batches: 5, seed: 7, modifiers: {a: {type: Recording}}}"))
    assert CompressionCallback(recipe=path).plan.calibration_batches == 5
    assert CompressionCallback(recipe=path, calibration_batches=9).plan.calibration_batches == 9
    assert CompressionCallback(recipe=path).plan.seed == 7


def test_the_callback_refuses_what_it_does_not_know(tmp_path):
    path = str(written(tmp_path, "compress: {calibrationbatches: 5, modifiers: {a: {type: Recording}}}"))
    with pytest.raises(ValueError, match=r"the recipe sets \['calibrationbatches'\], which CompressionCallback"):
        CompressionCallback(recipe=path)


# -- what a file may not do -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("modifiers.a", "modifiers: {a: {_target_: os.system, command: 'touch %s'}}"),
        ("modifiers.a", "modifiers: {a: {_target_: lightning_compress_evil.Modifier}}"),
        ("modifiers.a.start", "modifiers: {a: {type: Recording, start: {_target_: os.system, command: 'touch %s'}}}"),
        (r"modifiers.a.targets\[0\]", "modifiers: {a: {type: Recording, targets: [{_target_: os.system}]}}"),
        ("blocks", "{blocks: {_target_: os.system}, modifiers: {a: {type: Recording}}}"),
    ],
)
def test_no_target_but_ours(tmp_path, place, text):
    trace = tmp_path / "trace"
    text = text % trace if "%s" in text else text
    with pytest.raises(ValueError, match=f"{place}: _target_: [a-z_]+[.][A-Za-z]+ is refused"):
        load_recipe(written(tmp_path, text if text.startswith("{") else "{" + text + "}"))
    assert not trace.exists()


def test_the_callback_entry_names_the_callback(tmp_path):
    with pytest.raises(ValueError, match="_target_: os.system is not allowed here"):
        load_recipe({"_target_": "os.system", "command": "true", "modifiers": {"a": {"type": "Recording"}}})


def test_a_name_of_ours_that_is_no_modifier_is_unknown():
    with pytest.raises(ValueError, match="no modifier of type 'compress' found"):
        load_recipe({"modifiers": {"a": {"_target_": "lightning_compress.compress"}}})


def test_yaml_tags_are_not_obeyed(tmp_path):
    path = written(tmp_path, "modifiers: {a: !!python/object/apply:os.getcwd []}")
    with pytest.raises(ValueError, match=r"mine\.yaml is no YAML"):
        load_recipe(path)


# -- what is no recipe ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"optimizer": {}}, r"expected modifiers under compress, found \['optimizer'\]"),
        ({"modifiers": {}}, "modifiers is {}, expected at least one"),
        ({"modifiers": {"a": 3}}, "modifiers.a is 3, expected a mapping"),
        ({"modifiers": {"a": {"start": 3}}}, "modifiers.a needs either type or _target_"),
        ({"modifiers": {"a": {"type": "Recordin"}}}, "modifiers.a: no modifier of type 'Recordin' found; did you mean"),
        ({"modifiers": {"a": {"type": "Recording", "strat": 3}}}, "modifiers.a: .*unknown argument 'strat'"),
        ({"defaults": ["x"], "modifiers": {"a": {"type": "Recording"}}}, "only Hydra resolves"),
        ({"modifiers": {"a": {"type": "Recording", "start": "${x}"}}}, "is an interpolation"),
    ],
)
def test_what_is_wrong_is_named(recipe, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(recipe)


# -- there and back ---------------------------------------------------------------------------------------------------


def test_a_dumped_recipe_builds_the_same_modifiers(tmp_path):
    made = [GPTQModifier(scheme="W4A16"), RecordingModifier(start=1, group="x"), *load_recipe("w8a8")]
    dumped = dump_recipe(made)
    again = load_recipe(written(tmp_path, yaml.safe_dump(dumped, sort_keys=False)))
    assert [type(m) for m in again] == [type(m) for m in made]
    assert [m.model_dump() for m in again] == [m.model_dump() for m in made]
    assert dump_recipe(again) == dumped
    assert dumped["modifiers"]["RecordingModifier[x]"] == {
        "type": "Recording", "group": "x", "start": 1.0, "unit": "step"
    }  # fmt: skip


def test_differences_are_lines():
    one = {"modifiers": {"gptq": {"bits": 4, "targets": ["Linear"]}}}
    two = {"modifiers": {"gptq": {"bits": 3, "targets": ["Linear", "Conv1d"]}}}
    assert recipe_difference(one, one) == []
    lines = ["modifiers.gptq.bits: 4 -> 3", "modifiers.gptq.targets.1: 'absent' -> 'Conv1d'"]
    assert recipe_difference(one, two) == lines


def test_recipes_are_found_in_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_recipe("rtn_w4").modifiers
    assert os.listdir(tmp_path) == []
