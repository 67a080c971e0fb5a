"""Recipes: found by name, built by name, and nothing called that a file says."""

import ast
import os
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import yaml
from hydra import compose, initialize_config_dir, version
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobRuntime
from omegaconf import OmegaConf
from torch import nn

from lightning_compress import CompressionCallback, GPTQModifier, ModifierFactory, QuantizationModifier
from lightning_compress.quant.assignment import assign
from lightning_compress.quant.schemes import describe, from_groups
from lightning_compress.recipe import dump_recipe, load_recipe, read_recipe, recipe_difference
from tests.support.training_runs import RecordingModifier

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
    assert load_recipe(name)
    assert dump_recipe(load_recipe(CONF / f"{name}.yaml")) == dump_recipe(load_recipe(name))


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
    assert CompressionCallback(recipe=path).options.calibration_batches == 5
    assert CompressionCallback(recipe=path, calibration_batches=9).options.calibration_batches == 9
    assert CompressionCallback(recipe=path).options.calibration.seed == 7


def test_the_callback_refuses_what_it_does_not_know(tmp_path):
    path = str(written(tmp_path, "compress: {calibrationbatches: 5, modifiers: {a: {type: Recording}}}"))
    with pytest.raises(ValueError, match=r"the recipe sets \['calibrationbatches'\], which CompressionCallback"):
        CompressionCallback(recipe=path)


# -- defaults ---------------------------------------------------------------------------------------------------------

HEADER = "# @package callbacks\n"


def test_a_file_begins_from_a_recipe_or_from_blocks_of_the_package_and_of_its_own_folder(tmp_path):
    folder = tmp_path / "my recipes (2)"
    (folder / "parts").mkdir(parents=True)
    (folder / "parts" / "short.yaml").write_text(HEADER + "compress: {seed: 7, modifiers: {gptq: {block_size: 64}}}\n")
    defaults = "defaults: [gptq_w4, parts/short, scheme/int3_auto@compress.modifiers.rtn.config_groups.all, _self_]\n"
    rtn = "rtn: {type: QuantizationModifier}"
    recipe = read_recipe(written(folder, HEADER + defaults + f"compress: {{modifiers: {{gptq: {{start: 0}}, {rtn}}}}}"))
    gptq, rtn = recipe.modifiers
    assert (gptq.scheme, gptq.group_size, gptq.block_size, gptq.start) == ("W4A16", "auto", 64, 0)
    assert rtn.config_groups["all"]["weights"]["num_bits"] == 3
    assert recipe.arguments == {"seed": 7}


def test_a_file_of_the_users_comes_before_one_of_ours(tmp_path):
    (tmp_path / "gptq_w4.yaml").write_text(
        HEADER + "defaults: [modifier/gptq]\ncompress: {modifiers: {gptq: {scheme: W8A16}}}"
    )
    (modifier,) = load_recipe(written(tmp_path, HEADER + "defaults: [gptq_w4]\n"))
    assert modifier.scheme == "W8A16"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("defaults: [base/callback, modifier/gtpq]", "its defaults cannot be composed: Could not load '.*gtpq'[.]?$"),
        ("defaults: [base/callback, modifier/freeze]", "defaults cannot be composed: Missing mandatory value: targets"),
        ("defaults: [mine]", "the files in its defaults name each other in a circle"),
        ("defaults: 3", "its defaults cannot be composed: .*must be a list"),
        ("defaults: [[gptq_w4]]", "its defaults cannot be composed"),
        ("defaults: ['../../etc/hosts']", "its defaults cannot be composed: .*etc/hosts"),
        ("defaults: [gptq_w4, _self_]\nnull: 3", "its defaults cannot be composed: Incompatible key type"),
        ("defaults: ['${oc.env:HOME}']", r"'\$\{oc.env:HOME\}' is an interpolation"),
        ("defaults: [{'/${oc.env:HOME}': x}]", "is an interpolation"),
        ("defaults: [gptq_w4, _self_]\ncompress: {modifiers: {gptq: {start: '${x}'}}}", "is an interpolation"),
        ("defaults: [gptq_w4, _self_]\ncompress: {modifiers: {gptq: {_target_: os.system}}}", "os.system is refused"),
        ("defaults: [gptq_w4, _self_]\ncompress: {_target_: os.system}", "os.system is not allowed here"),
        ("defaults: [gptq_w4, _self_]\ncompress: {modifiers: {gptq: {start: 010}}}", "010 would be read as 8"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_defaults_is_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_recipe(written(tmp_path, HEADER + text))
    assert "mine.yaml" in str(caught.value)


@pytest.mark.parametrize("text", ["defaults: ['${called:x}']", "compress: {modifiers: {gptq: {start: '${called:x}'}}}"])
def test_no_resolver_is_called_for_a_file_that_another_file_names(tmp_path, text):
    called = []
    OmegaConf.register_new_resolver("called", called.append)
    try:
        (tmp_path / "other.yaml").write_text(HEADER + text)
        with pytest.raises(ValueError, match=r"other\.yaml: '\$\{called:x\}' is an interpolation"):
            load_recipe(written(tmp_path, HEADER + "defaults: [gptq_w4, other]"))
        assert called == []
    finally:
        OmegaConf.clear_resolver("called")


def test_reading_leaves_a_hydra_app_that_is_running_as_it_is(tmp_path):
    (tmp_path / "app.yaml").write_text("x: 1\n")
    with initialize_config_dir(str(tmp_path), job_name="mine", version_base="1.3"):
        hydra, config = GlobalHydra.instance().hydra, HydraConfig.instance().cfg
        base, name = version.getbase(), JobRuntime.instance().get("name")
        assert load_recipe("gptq_w2")
        assert GlobalHydra.instance().hydra is hydra
        assert HydraConfig.instance().cfg is config
        assert (version.getbase(), JobRuntime.instance().get("name")) == (base, name)
        assert compose("app") == {"x": 1}
    assert not GlobalHydra.instance().is_initialized()


def test_importing_recipes_does_not_import_hydra():
    tree = ast.parse((CONF.parents[1] / "lightning_compress" / "recipe.py").read_text())
    names = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not any("hydra" in name or "recipe_files" in name for name in names), names


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
    with pytest.raises(ValueError, match=r"mine\.yaml is not valid YAML"):
        load_recipe(path)


# -- what is not a recipe ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"optimizer": {}}, r"expected modifiers under compress, found \['optimizer'\]"),
        ({"modifiers": {}}, "modifiers is {}, expected at least one"),
        ({"modifiers": {"a": 3}}, "modifiers.a is 3, expected a mapping"),
        ({"modifiers": {"a": {"start": 3}}}, "modifiers.a needs either type or _target_"),
        ({"modifiers": {"a": {"type": "Recordin"}}}, "modifiers.a: no modifier of type 'Recordin' found; did you mean"),
        ({"modifiers": {"a": {"type": "Recording", "strat": 3}}}, "modifiers.a: .*unknown argument 'strat'"),
        ({"defaults": ["x"], "modifiers": {"a": {"type": "Recording"}}}, "has a defaults list, .* save it as x.yaml"),
        ({"modifiers": {"a": {"type": "Recording", "start": "${x}"}}}, "is an interpolation"),
    ],
)
def test_what_is_wrong_is_named(recipe, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(recipe)


LAUGHS = "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))
CHAIN = "a0: &a0 []\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 3000))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modifiers: {a: {type: Recording, start: 010}}", r"010 would be read as 8; write that, or '010' in quotes"),
        ("modifiers: {a: {type: Recording, start: 1:20}}", "1:20 would be read as 80"),
        ("modifiers: {a: {type: Recording, start: 1_0}}", "1_0 would be read as 10"),
        ("modifiers: {a: {type: Recording, start: 1:20.5}}", "1:20.5 would be read as 80.5"),
        ("modifiers: {a: {type: Recording, group: 2:4}}", "2:4 would be read as 124; write that, or '2:4' in quotes"),
        ("modifiers: {a: {type: Recording, start: .nan}}", "start=nan: Input should be a finite number"),
        ("modifiers: {a: {type: Recording, start: yes}}", "start=True: expected a number"),
        ("modifiers: {a: {type: Recording}, a: {}}", "the key 'a' stands here twice; the last would win"),
        ("{modifiers: {a: {type: Recording}}, modifiers: {}}", "the key 'modifiers' stands here twice"),
        ("modifiers: {a: {type: Recording, allow_registered: false}}", "unknown argument 'allow_registered'"),
        ("modifiers: {a: {type: Recording, type_: x}}", "unknown argument 'type_'"),
        ("modifiers: {a: {type: Recording, self: x}}", "unknown argument 'self'"),
        ("modifiers: {a: {type: Recording, null: 3}}", "modifiers.a: None is not the name of an argument"),
        ("{3: 3, modifiers: {a: {type: Recording}}}", "3 is not the name of an argument"),
        ("modifiers: {a: {type: Recording, start: !!int x}}", "is not valid YAML: invalid literal for int"),
        ("modifiers: {a: &c {type: Recording, again: *c}}", "an alias in it stands inside of what it names"),
        ("modifiers: {a: " + "[" * 5000 + "]" * 5000 + "}", "hundreds of mappings and lists stand in each other"),
        ("modifiers: {a: " + "[" * 50 + "]" * 50 + "}", "more than 40 mappings and lists in each other"),
        (LAUGHS, "more than 100,000 entries"),
        (CHAIN, "40 mappings and lists in each other"),
    ],
)  # fmt: skip
def test_yaml_that_does_not_read_as_it_looks(tmp_path, text, message):
    path = written(tmp_path, text)
    with pytest.raises(ValueError, match=message) as caught:
        read_recipe(path)
    assert "mine.yaml" in str(caught.value)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_another_encoding_is_named_with_the_file(tmp_path, encoding):
    path = tmp_path / "mine.yaml"
    path.write_bytes("modifiers: {a: {type: Recording, group: große}}".encode(encoding))
    with pytest.raises(ValueError, match=r"mine\.yaml is not in UTF-8 .*; save it in that encoding"):
        read_recipe(path)


@pytest.mark.parametrize("source", [None, 3, []])
def test_what_cannot_be_a_source(source):
    with pytest.raises(ValueError, match="expected the name of a recipe, the path of a YAML file or a mapping, got"):
        read_recipe(source)


def test_aliases_and_merges_of_usual_size_are_fine(tmp_path):
    text = "modifiers: {a: &a {type: Recording, start: 1, end: 0x10}, b: {<<: *a, start: 2, group: 'ß'}}"
    first, second = load_recipe(written(tmp_path, text))
    assert (first.start, second.start, second.end, second.group) == (1, 2, 16, "ß")


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


GROUPS = {"w3": {"targets": ["Linear"], "weights": {"num_bits": 3, "strategy": "group", "group_size": "auto"}}}
QUANTIZERS = ["AutoRoundModifier", "AWQModifier", "GPTQModifier", "QATModifier", "QuantizationModifier"]
PRUNERS = ["SparseGPTModifier", "WandaPruningModifier"]
FORMS = [
    *((name, {"config_groups": GROUPS}) for name in QUANTIZERS),
    *((name, {"scheme": {"W4A16": ["re:.*up"], "W8A16": "re:.*down"}, "group_size": [64, -1]}) for name in QUANTIZERS),
    *((name, {"scheme": {"weights": {"num_bits": 4}}, "targets": ["re:.*up"]}) for name in QUANTIZERS),
    *((name, {"scheme": "W4A16", "targets": "re:.*up"}) for name in QUANTIZERS),
    *((name, {"sparsity": {"re:.*up": 0.5, "Linear": 0.25}}) for name in PRUNERS),
    *((name, {"sparsity": 0.7, "sparsity_profile": "owl", "owl_m": 3.0}) for name in PRUNERS),
    ("MagnitudePruningModifier", {"targets": "Linear", "layer_sparsity": {"re:.*up": 0.8}}),
    ("MovementPruningModifier", {"end": 1.0, "unit": "fraction"}),
    ("MovementPruningModifier", {"end": 9, "mode": "soft", "threshold": 0.2}),
    ("SmoothQuantModifier", {"mappings": [[["re:.*q_proj"], "re:.*norm"]]}),
    ("RotationModifier", {}),
    ("KVCacheModifier", {}),
    ("DepthPruningModifier", {"layers": [1], "start": 0}),
    ("DistillationModifier", {"hidden": {"layers.0": "layers.1"}, "hidden_weight": 0.5}),
    ("FreezeModifier", {"targets": "re:.*embed"}),
    ("ConstantPruningModifier", {"targets": "Linear", "ignore": "re:.*head"}),
    ("WandaPruningModifier", {"regional_rounds": 2, "regional_rate": 1e-5}),
    ("StructuredPruningModifier", {"dimension": "channels", "input_shape": [1, 3, 8, 8]}),
]


def alternatives(form):
    """Modifiers with one argument changed: each other value of a Literal, a bool turned around; those that build."""
    name, arguments = form
    cls = ModifierFactory.find(name)
    for field, info in cls.model_fields.items():
        if field in arguments:
            continue
        kinds = get_args(info.annotation) if get_origin(info.annotation) is Literal else ()
        for value in (True, False) if info.annotation is bool else kinds:
            try:
                yield cls(**arguments, **{field: value})
            except ValueError:
                continue  # two arguments that exclude each other


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_whatever_builds_is_written_out_and_read_back(tmp_path, form):
    made = [ModifierFactory.find(form[0])(**form[1]), *alternatives(form)]
    assert len(made) > 1
    dumped = dump_recipe(made)
    again = load_recipe(written(tmp_path, yaml.safe_dump(dumped, sort_keys=False)))
    assert [m.model_dump() for m in again] == [m.model_dump() for m in made]
    assert dump_recipe(again) == dumped


@pytest.mark.parametrize("name", sorted(p.stem for p in CONF.glob("*.yaml")))
def test_every_recipe_is_written_out_and_read_back(tmp_path, name):
    dumped = CompressionCallback(recipe=name).recipe
    path = written(tmp_path, yaml.safe_dump(dumped, sort_keys=False))
    again = CompressionCallback(recipe=str(path))
    assert again.recipe == dumped
    assert [m.model_dump() for m in again.lifecycle.modifiers] == [m.model_dump() for m in load_recipe(name)]


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
