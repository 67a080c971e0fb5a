"""Names of the modifiers: read from the class statements, and equal to what the modules define."""

from pathlib import Path

import pytest

from lightning_compress import modifiers
from lightning_compress.core import Modifier, ModifierFactory, ModifierInterface
from scripts.modifier_stub import stub


def test_the_names_are_those_of_the_concrete_classes():
    classes = ModifierFactory.load_from_package("lightning_compress.modifiers")
    assert dict(modifiers.modules()) == {name: kind.__module__ for name, kind in classes.items()}


def test_type_checkers_see_them():
    text = Path(modifiers.__file__).with_suffix(".pyi").read_text(encoding="utf-8")
    assert text == stub(), "run `make format`, which writes lightning_compress/modifiers/__init__.pyi"


def test_the_contract_stands_beside_them():
    names = ["Modifier", "ModifierFactory", "ModifierInterface"]
    assert [getattr(modifiers, name) for name in names] == [Modifier, ModifierFactory, ModifierInterface]
    assert set(modifiers.__all__) == {*names, *modifiers.modules()}


def test_a_base_class_is_not_offered():
    with pytest.raises(ValueError, match="no modifier of type 'SmoothingModifier' found; did you mean "):
        ModifierFactory.find("SmoothingModifier")
    with pytest.raises(AttributeError, match="has no attribute 'SmoothingModifier'; it has AWQModifier, "):
        modifiers.SmoothingModifier  # noqa: B018
