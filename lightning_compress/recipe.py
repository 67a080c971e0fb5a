"""Recipes: modifiers from YAML, built by name.

A recipe is a file of ``conf/compress`` (named ``gptq_w4``), a file of the user's, or a dict. Hydra composes what a file
names in its ``defaults``; all of it, or what one file or dict holds, reads::

    compress:
      calibration_batches: 32                          # optional arguments of the callback
      modifiers:
        gptq: {type: GPTQModifier, targets: [Linear], scheme: W4A16}

``_target_: lightning_compress.GPTQModifier``, as Hydra wants it, means the same as ``type: GPTQModifier``. Nothing
else may stand in a ``_target_``: a file that someone sent names modifiers, it does not call functions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_compress.core.factory import ModifierFactory
from lightning_compress.core.lifecycle import Lifecycle
from lightning_compress.core.modifier import Modifier

__all__ = ["Recipe", "dump_recipe", "load_recipe", "read_recipe", "recipe_difference"]

OWN = "lightning_compress."


@dataclass(frozen=True)
class Recipe:
    """A recipe as it was read.

    Args:
        modifiers: In the recipe's order.
        arguments: Other arguments of the callback that it sets.
    """

    modifiers: list[Modifier]
    arguments: dict[str, Any] = field(default_factory=dict)


def load_recipe(source: str | Path | Mapping[str, Any]) -> list[Modifier]:
    """The modifiers of a recipe; see :func:`read_recipe`."""
    return read_recipe(source).modifiers


def read_recipe(source: str | Path | Mapping[str, Any]) -> Recipe:
    """Build a recipe.

    Args:
        source: The name of a recipe of this package, the path of a YAML file, or what such a file holds.

    Raises:
        ValueError: There is no such recipe (near misses are listed), it is not a recipe, a ``_target_`` is not a
            modifier of this package, or an argument is wrong.
    """
    from lightning_compress.recipe_files import check_plain, locate, read_file  # imports Hydra

    if isinstance(source, Mapping):
        check_plain(source, "the recipe")
        return _build(source, "the recipe")
    if not isinstance(source, str | Path):
        raise ValueError(f"expected the name of a recipe, the path of a YAML file or a mapping, got {source!r}")
    path = locate(source)
    return _build(read_file(path), str(path))


def dump_recipe(modifiers: Sequence[Modifier]) -> dict[str, Any]:
    """The recipe as primitives, defaults spelled out (but for None); :func:`load_recipe` takes it back."""
    keys = Lifecycle(modifiers).keys()
    return {"modifiers": {key: _entry(m) for key, m in zip(keys, modifiers, strict=True)}}


def _entry(modifier: Modifier) -> dict[str, Any]:
    names = {c: name for name, c in ModifierFactory._registered.items()}
    fields = type(modifier).model_fields
    arguments = {name: _plain(modifier, name) for name in fields}
    settings = {n: v for n, v in arguments.items() if v is not None or fields[n].default is not None}
    return {"type": names.get(type(modifier), type(modifier).__name__), **settings}


def _plain(modifier: Modifier, name: str) -> Any:
    """An argument as primitives; of one that no file can hold (a teacher that is a module) its class stays."""
    try:
        return modifier.model_dump(mode="json", include={name})[name]
    except ValueError:
        return f"<{type(getattr(modifier, name)).__name__}>"


def recipe_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line per entry that differs between two dumped recipes, such as ``modifiers.gptq.bits: 4 -> 3``.

    The order of the modifiers counts: where it alone differs, the line is ``order of modifiers: a, b -> b, a``.
    """
    old, new = _flat(before), _flat(now)
    entries = [name for name in {**old, **new} if old.get(name, "absent") != new.get(name, "absent")]
    lines = [f"{name}: {old.get(name, 'absent')!r} -> {new.get(name, 'absent')!r}" for name in entries]
    was, is_ = ([*recipe.get("modifiers", ())] for recipe in (before, now))
    if sorted(was) == sorted(is_) and was != is_:
        lines.append(f"order of modifiers: {', '.join(was)} -> {', '.join(is_)}")
    return lines


# -- what is in it ----------------------------------------------------------------------------------------------------


def _build(content: Any, origin: str) -> Recipe:
    arguments = _named_arguments(_descend(content, origin), origin)
    if "defaults" in arguments:
        raise ValueError(
            f"{origin} has a defaults list, which is resolved at the top of a file only: save it as x.yaml"
        )
    target = arguments.pop("_target_", f"{OWN}CompressionCallback")
    if target not in (f"{OWN}CompressionCallback", f"{OWN}callback.CompressionCallback"):
        raise ValueError(f"{origin}: _target_: {target} is not allowed here, expected {OWN}CompressionCallback")
    arguments.pop("_convert_", None)
    entries = arguments.pop("modifiers", None)
    if not entries or not isinstance(entries, Mapping | Sequence) or isinstance(entries, str):
        raise ValueError(f"{origin}: modifiers is {entries!r}, expected at least one, by name: {{gptq: ...}}")
    named = entries.items() if isinstance(entries, Mapping) else enumerate(entries)
    for name, value in arguments.items():
        _refuse_targets(value, f"{origin}: {name}")
    return Recipe([_modifier(entry, f"{origin}: modifiers.{name}") for name, entry in named], arguments)


def _descend(content: Any, origin: str) -> dict[str, Any]:
    """What stands under ``compress`` (or under ``callbacks.compress``, or at the top)."""
    for key in ("callbacks", "compress"):
        if isinstance(content, Mapping) and "modifiers" not in content and key in content:
            content = content[key]
    if not isinstance(content, Mapping) or "modifiers" not in content:
        keys = sorted(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"{origin} is not a recipe: expected modifiers under compress, found {keys}")
    return dict(content)


def _modifier(entry: Any, place: str) -> Modifier:
    if isinstance(entry, Modifier):
        return entry
    if not isinstance(entry, Mapping):
        raise ValueError(f"{place} is {entry!r}, expected a mapping such as {{type: GPTQModifier, scheme: W4A16}}")
    arguments = _named_arguments(entry, place)
    arguments.pop("_convert_", None)
    target = arguments.pop("_target_", None)
    type_ = arguments.pop("type", None)
    if (target is None) == (type_ is None):
        raise ValueError(f"{place} needs either type or _target_, such as type: GPTQModifier")
    if target is not None:
        if not isinstance(target, str) or not target.startswith(OWN):
            raise ValueError(
                f"{place}: _target_: {target} is refused: a recipe file may only name modifiers of this package; "
                f"for a modifier of your own use ModifierFactory.register and type: its name"
            )
        type_ = target.rsplit(".", 1)[-1]
    for name, value in arguments.items():
        _refuse_targets(value, f"{place}.{name}")
    try:
        return ModifierFactory.find(str(type_))(**arguments)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _named_arguments(entry: Mapping[Any, Any], place: str) -> dict[str, Any]:
    if other := [key for key in entry if not isinstance(key, str)]:
        raise ValueError(f"{place}: {other[0]!r} is not the name of an argument; write names as text")
    return dict(entry)


def _refuse_targets(value: Any, place: str) -> None:
    """``_target_`` and its like inside arguments would mean calling what the file says."""
    if isinstance(value, Mapping):
        if "_target_" in value:
            raise ValueError(f"{place}: _target_: {value['_target_']} is refused: a recipe file calls nothing")
        for name, inner in value.items():
            _refuse_targets(inner, f"{place}.{name}")
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for i, inner in enumerate(value):
            _refuse_targets(inner, f"{place}[{i}]")


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted name; a list is walked as a mapping of its indices, an empty container is a leaf."""
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, Sequence) and not isinstance(value, str):
        items = enumerate(value)
    leaves: dict[str, Any] = {}
    for name, inner in items:
        leaves |= _flat(inner, f"{prefix}.{name}" if prefix else str(name))
    return leaves if leaves else {prefix: value}
