"""The JSON schema of recipe files, for editors, from the pydantic models:  make format

It is written to conf/compress/recipe.schema.json.
An entry of ``modifiers`` is checked against the modifier that its ``_target_`` (or ``type``) names, or else against the
one of the block ``modifier/*.yaml`` that has an entry of this name. Types, limits and defaults come from the pydantic
models, descriptions from the docstrings. Recipes name the schema in their second line, ``# yaml-language-server: ...``.
"""

import inspect
import json
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from docstring_parser import parse
from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

import lightning_compress
from lightning_compress import CompressionCallback, Modifier

COMPRESS = Path(__file__).resolve().parents[1] / "conf" / "compress"
SCHEMA = COMPRESS / "recipe.schema.json"
OWN = "lightning_compress."
HYDRA = {"type": "string", "pattern": r"^\?\?\?$|\$\{", "description": "A value that is missing, or an interpolation."}
NAMED = {"_target_": {"type": "string"}, "type": {"type": "string"}, "_convert_": {"const": "all"}}


class _Schema(GenerateJsonSchema):
    """Objects of Python (a teacher that is a module) allow any value."""

    def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> dict[str, Any]:
        return {}


def recipe_schema() -> dict[str, Any]:
    """The schema of a recipe file."""
    classes = {name: getattr(lightning_compress, name) for name in sorted(lightning_compress.__all__)}
    modifiers = {n: c for n, c in classes.items() if isinstance(c, type) and issubclass(c, Modifier) and c != Modifier}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "A recipe of lightning_compress",
        "type": "object",
        "properties": {
            "defaults": {"type": "array", "items": {"type": ["string", "object"]}},
            "callbacks": _closed({"compress": {"$ref": "#/definitions/callback"}}),
            "compress": {"$ref": "#/definitions/callback"},
            "modifiers": {"$ref": "#/definitions/modifiers"},
        },
        "additionalProperties": False,
        "definitions": {
            "hydra": HYDRA,
            "callback": _callback(),
            "modifiers": _modifiers(),
            "named": {"type": "object", "allOf": [_if_named(name) for name in modifiers]},
            **{name: _modifier(kind) for name, kind in modifiers.items()},
        },
    }


def _callback() -> dict[str, Any]:
    types = get_type_hints(CompressionCallback.__init__)
    parameters = list(inspect.signature(CompressionCallback).parameters.values())
    arguments = {
        p.name: TypeAdapter(types[p.name]).json_schema() | {"default": p.default}
        for p in parameters
        if p.name not in ("modifiers", "recipe")
    }
    modifiers = {"modifiers": {"$ref": "#/definitions/modifiers"}}
    return _closed({"_target_": {"const": f"{OWN}CompressionCallback"}, "_convert_": {"const": "all"}, **modifiers}
                   | _fields(arguments, CompressionCallback))  # fmt: skip


def _modifiers() -> dict[str, Any]:
    blocks = [yaml.safe_load(path.read_text()) for path in sorted(COMPRESS.glob("modifier/*.yaml"))]
    kinds = {name: entry["_target_"].removeprefix(OWN) for block in blocks for name, entry in block.items()}
    named = {"anyOf": [{"required": ["_target_"]}, {"required": ["type"]}]}
    by_name = {
        name: {"if": named, "then": {"$ref": "#/definitions/named"}, "else": {"$ref": f"#/definitions/{kind}"}}
        for name, kind in kinds.items()
    }
    others = {"$ref": "#/definitions/named"}
    return {"type": ["object", "array"], "properties": by_name, "additionalProperties": others, "items": others}


def _if_named(name: str) -> dict[str, Any]:
    target = {
        "properties": {"_target_": {"pattern": rf"^lightning_compress\.(.*\.)?{name}$"}},
        "required": ["_target_"],
    }
    type_ = {"properties": {"type": {"const": name}}, "required": ["type"]}
    return {"if": {"anyOf": [target, type_]}, "then": {"$ref": f"#/definitions/{name}"}}


def _modifier(kind: type[Modifier]) -> dict[str, Any]:
    description = next(c.__doc__ for c in kind.__mro__ if c.__doc__).strip().splitlines()[0]
    fields = kind.model_json_schema(schema_generator=_Schema)["properties"]
    return {"description": description} | _closed(NAMED | _fields(fields, kind))


def _fields(fields: dict[str, Any], kind: type) -> dict[str, Any]:
    """Each may be what Hydra fills in, too; with the description that stands in the docstring nearest to ``kind``."""
    docs = [p for c in reversed(kind.__mro__) for p in parse(c.__dict__.get("__doc__") or "").params]
    texts = {name.strip(): " ".join((p.description or "").split()) for p in docs for name in p.arg_name.split(",")}
    schema = {}
    for name, field in fields.items():
        field = {key: value for key, value in field.items() if key != "title"}
        outer = {"description": texts[name]} if name in texts else {}
        if "default" in field:
            outer["default"] = field.pop("default")
        kinds = field["anyOf"] if [*field] == ["anyOf"] else [field]
        schema[name] = outer | ({"anyOf": [*kinds, {"$ref": "#/definitions/hydra"}]} if field else {})
    return schema


def _closed(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False}


def as_text(value: Any, lines: int = 4) -> str:
    """JSON with a line for each field of each modifier."""
    if lines == 0 or not isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    entries = ",\n".join(f"{json.dumps(key)}: {as_text(inner, lines - 1)}" for key, inner in value.items())
    return f"{{\n{entries}\n}}"


if __name__ == "__main__":
    SCHEMA.write_text(as_text(recipe_schema()) + "\n", encoding="utf-8")
    print(f"wrote {SCHEMA.relative_to(COMPRESS.parents[1])}")
