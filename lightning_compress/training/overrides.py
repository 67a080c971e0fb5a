"""What to type after a run so that the next one treats a module with more care: overrides in a Hydra app, else Python.

The word MODULE stands for the name of a module; of several names, between commas, in an override.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_compress.core.modifier import Modifier
from lightning_compress.layers.matching import listed
from lightning_compress.quant.arguments import ALLOCATED, QuantizationArguments

__all__ = ["leave_dense", "more_bits"]

PRESETS = {"16": "W8A16", "8": "W8A8"}  # by the bits of inputs
ANY_WIDTH = {"targets": ["MODULE"], "weights": {"num_bits": 8, "strategy": "channel"}}  # W8A16 has groups of 128


def leave_dense(modifiers: Sequence[Modifier]) -> dict[str, str]:
    """By technique, how to add MODULE to what its modifier ignores."""
    texts = {}
    for modifier in modifiers:
        technique, ignore = getattr(modifier, "technique", None), getattr(modifier, "ignore", None)
        if technique is not None and ignore is not None:
            texts[str(technique)] = _text(modifier, {"ignore": [*listed(ignore), "MODULE"]})
    return texts


def more_bits(modifiers: Sequence[Modifier]) -> dict[str, dict[str, str]]:
    """By technique and bits of inputs, how to give MODULE weights of 8 bits; what is already shorter is left out.

    There is no text where schemes are allocated, or name single modules, since the first of two such groups wins.
    """
    texts: dict[str, dict[str, str]] = {}
    for modifier in modifiers:
        technique = getattr(modifier, "technique", None)
        if technique is None or not isinstance(modifier, QuantizationArguments) or modifier.scheme == ALLOCATED:
            continue
        if any("." in target and not target.startswith("re:") for s in modifier.schemes for target in s.targets):
            continue
        for inputs in PRESETS:
            changes = _promoted(modifier, inputs)
            if _is_valid(modifier, changes):
                texts.setdefault(str(technique), {})[inputs] = _text(modifier, changes)
    return texts


def _promoted(modifier: QuantizationArguments, inputs: str) -> dict[str, Any]:
    """The arguments that change."""
    preset, scheme = PRESETS[inputs], modifier.scheme
    group = {"w8": ANY_WIDTH} if inputs == "16" else {preset: ["MODULE"]}
    if isinstance(scheme, str):  # with the group size of the other modules
        return {"scheme": {scheme: listed(modifier.targets), preset: ["MODULE"]}}
    if scheme is None:  # merged with the other groups
        return {"config_groups": group}
    if "weights" in scheme:
        groups = {"all": {"targets": listed(modifier.targets), **scheme}, **group}
        return {"scheme": None, "config_groups": groups}
    return {"scheme": {preset: [*_listed(scheme.get(preset)), "MODULE"]}}  # merged with the other presets


def _listed(targets: Any) -> list[str]:
    return listed(targets) if isinstance(targets, str | list) else []


def _is_valid(modifier: Modifier, changes: Mapping[str, Any]) -> bool:
    """Whether the class takes the arguments of the modifier with these changes."""
    fields = modifier.model_dump()
    for name, value in changes.items():
        fields[name] = {**(fields[name] or {}), **value} if isinstance(fields[name], dict) and value else value
    try:
        type(modifier)(**fields)
    except ValueError:
        return False
    return True


def _text(modifier: Modifier, changes: Mapping[str, Any]) -> str:
    commands = [modifier.override(name, _value(value)).partition("line: ")[2] for name, value in changes.items()]
    if all(commands):
        return " ".join(f"'{command}'" for command in commands)
    return f"{modifier.name}({', '.join(f'{name}={value!r}' for name, value in changes.items())})"


def _value(value: Any) -> str:
    """As Hydra's grammar for overrides writes it."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_value(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_value, value)) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
