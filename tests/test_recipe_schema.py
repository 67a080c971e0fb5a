"""The schema that editors check recipes against: as the models are now, true to every recipe, useful in mistakes."""

import json
import re
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from lightning_compress import CompressionCallback
from lightning_compress.recipe import load_recipe
from scripts import recipe_schemas

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf" / "compress"
RECIPES = sorted(CONF.glob("*.yaml"))


@pytest.fixture(scope="module")
def valid():
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed: pip install -e .[dev]")
    schema = json.loads((CONF / "recipe.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft7Validator.check_schema(schema)
    return jsonschema.Draft7Validator(schema)


def errors(validator, recipe):
    return [f"{'.'.join(map(str, e.absolute_path))}: {e.message}" for e in validator.iter_errors(recipe)]


def test_the_schema_is_that_of_the_models():
    pin = re.search(r"^pydantic==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    if pin is None or pin[1] != version("pydantic"):
        pytest.skip("written with the pydantic of constraints.txt; each version words a schema in its own way")
    written = recipe_schemas.SCHEMA.read_text(encoding="utf-8")
    assert written == recipe_schemas.as_text(recipe_schemas.recipe_schema()) + "\n", (
        "run  make format  (or python -m scripts.recipe_schemas) and commit what it writes"
    )


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_names_the_schema_and_is_valid(valid, path):
    assert path.read_text().splitlines()[1] == "# yaml-language-server: $schema=recipe.schema.json"
    assert errors(valid, yaml.safe_load(path.read_text())) == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_with_everything_spelled_out_is_valid(valid, path):
    assert errors(valid, CompressionCallback(recipe=path.stem).recipe) == []


def test_the_defaults_in_the_schema_are_those_of_the_modifiers(valid):
    for modifier in load_recipe("smoothquant_w8a8"):
        fields = valid.schema["definitions"][type(modifier).__name__]["properties"]
        plain = {name: field.get_default() for name, field in type(modifier).model_fields.items()}
        assert {name: field["default"] for name, field in fields.items() if "default" in field} == plain
        assert set(plain) == set(fields) - {"_target_", "_convert_", "type"}


@pytest.mark.parametrize(
    ("modifiers", "message"),
    [
        ({"gptq": {"schema": "W4A16"}}, "modifiers.gptq: Additional properties are not allowed ("),
        ({"gptq": {"actorder": "group"}}, "modifiers.gptq.actorder: 'group' is not valid under any"),
        ({"gptq": {"averaging_constant": 2}}, "modifiers.gptq.averaging_constant: 2 is not valid under any"),
        ({"mine": {"_target_": "lightning_compress.QATModifier", "scheme": 4}}, "modifiers.mine.scheme: 4 is not"),
        ({"mine": {"type": "WandaPruningModifier", "bits": 4}}, "modifiers.mine: Additional properties"),
    ],
)  # fmt: skip
def test_a_mistake_is_marked_where_it_stands(valid, modifiers, message):
    (error,) = errors(valid, {"compress": {"modifiers": modifiers}})
    assert error.startswith(f"compress.{message}")


def test_what_hydra_fills_in_and_modifiers_of_the_users_own_are_valid(valid):
    entry = {"scheme": "${oc.env:SCHEME}", "group_size": "???"}
    own = {"_target_": "mine.OwnModifier", "anything": 3}
    callback = {"export_dir": "${paths.output_dir}/x", "modifiers": {"gptq": entry, "a": own}}
    assert errors(valid, {"compress": callback}) == []
    assert errors(valid, {"compress": callback | {"export_dir": 3}}) != []
