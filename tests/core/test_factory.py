"""Names to classes: registered, installed, of this package; import errors that are told."""

import importlib
import shutil
import sys
import textwrap
from importlib.metadata import EntryPoint

import pytest

from lightning_compress import modifiers
from lightning_compress.core import Modifier, ModifierFactory, State
from lightning_compress.core import factory as module


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """Each test sees a factory of its own."""
    monkeypatch.setattr(ModifierFactory, "_registered", {})
    monkeypatch.setattr(ModifierFactory, "_plugins", None)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Write modules into a package that takes the place of lightning_compress.modifiers."""
    name = f"package_of_{tmp_path.name.replace('-', '_')}"
    folder = tmp_path / name
    folder.mkdir()
    shutil.copy(modifiers.__file__, folder)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(module, "PACKAGE", name)

    def write(**files: str) -> str:
        for stem, text in files.items():
            path = folder / f"{stem.replace('__in__', '/')}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text(textwrap.dedent(text))
        importlib.invalidate_caches()
        return name

    yield write
    for loaded in [n for n in sys.modules if n.split(".")[0] == name]:
        del sys.modules[loaded]


PLAIN = """
    from lightning_compress.core import Modifier

    class PlainModifier(Modifier):
        strength: float = 1.0

        def on_initialize(self, state, **kwargs):
            return True
"""


class MineModifier(Modifier):
    strength: float = 1.0

    def on_initialize(self, state: State, **kwargs) -> bool:
        return True


def test_create_by_name_with_arguments(package):
    package(plain=PLAIN)
    made = ModifierFactory.create("PlainModifier", True, True, strength=0.5, start=2)
    assert (type(made).__name__, made.strength, made.start) == ("PlainModifier", 0.5, 2)


def test_wrong_arguments_are_named(package):
    package(plain=PLAIN)
    with pytest.raises(ValueError, match="PlainModifier: unknown argument 'strenght'; did you mean 'strength'"):
        ModifierFactory.create("PlainModifier", strenght=0.5)


def test_an_unknown_name_lists_near_misses(package):
    package(plain=PLAIN)
    with pytest.raises(ValueError, match="no modifier of type 'PlaneModifier' found; did you mean PlainModifier"):
        ModifierFactory.create("PlaneModifier")
    with pytest.raises(ValueError, match="no modifier of type 'x' found; known: PlainModifier"):
        ModifierFactory.create("x")


# -- register --------------------------------------------------------------------------------------------------------


def test_register_as_a_call_and_as_a_decorator(package):
    package(plain=PLAIN)
    assert ModifierFactory.register("Mine", MineModifier) is MineModifier

    @ModifierFactory.register("Decorated")
    class DecoratedModifier(MineModifier):
        pass

    @ModifierFactory.register
    class BareModifier(MineModifier):
        pass

    assert type(ModifierFactory.create("Mine")) is MineModifier
    assert type(ModifierFactory.create("Decorated")) is DecoratedModifier
    assert type(ModifierFactory.create("BareModifier")) is BareModifier


@pytest.mark.parametrize("thing", [int, "MineModifier", 3, MineModifier()], ids=["class", "name", "number", "instance"])
def test_register_what_is_no_modifier_class(thing):
    """For what is no class at all, the reference's own check ends in a TypeError."""
    with pytest.raises(ValueError, match="cannot register 'Mine': expected a subclass of Modifier, got "):
        ModifierFactory.register("Mine", thing)
    with pytest.raises(ValueError, match="expected a subclass of Modifier"):
        ModifierFactory.register("Mine")(thing)


def test_registered_classes_can_be_left_out(package):
    package(plain=PLAIN)
    ModifierFactory.register("Mine", MineModifier)
    ModifierFactory.register("PlainModifier", MineModifier)
    assert type(ModifierFactory.create("PlainModifier")) is MineModifier
    assert type(ModifierFactory.create("PlainModifier", allow_registered=False)) is not MineModifier
    with pytest.raises(ValueError, match="no modifier of type 'Mine' found"):
        ModifierFactory.create("Mine", allow_registered=False)


def test_refresh_keeps_what_was_registered_and_returns_it(package, monkeypatch):
    name = package(plain=PLAIN)
    ModifierFactory.register("Mine", MineModifier)
    assert ModifierFactory.refresh() == {"Mine": MineModifier}
    plug_in(monkeypatch, f"{name}.plain:PlainModifier")
    with pytest.raises(ValueError, match="PlugModifier"):
        ModifierFactory.create("PlugModifier")
    ModifierFactory.refresh()
    assert ModifierFactory.create("PlugModifier")
    assert type(ModifierFactory.create("Mine")) is MineModifier


# -- import errors ---------------------------------------------------------------------------------------------------

BROKEN = """
    import a_package_that_is_not_there
    from lightning_compress.core import Modifier

    class SubtleModifier(Modifier):
        pass
"""


def test_an_import_error_comes_with_its_cause_when_the_name_is_asked_for(package, capsys):
    name = package(plain=PLAIN, pruning=BROKEN)
    assert ModifierFactory.create("PlainModifier")  # others are not in its way
    message = f"'SubtleModifier' is defined in {name}.pruning, which failed to import: .*a_package_that_is_not_there"
    with pytest.raises(ImportError, match=message) as raised:
        ModifierFactory.create("SubtleModifier")
    assert isinstance(raised.value.__cause__, ModuleNotFoundError)
    assert capsys.readouterr() == ("", "")  # the reference prints it, and loses it


def test_errors_of_any_kind_are_told(package):
    package(
        wrong="class WrongModifier(Modifier):\n    pass pass\n", zero="1 / 0\nclass ZeroModifier(Modifier):\n    pass\n"
    )
    with pytest.raises(ImportError, match="WrongModifier") as raised:
        ModifierFactory.create("WrongModifier")
    assert isinstance(raised.value.__cause__, SyntaxError)
    with pytest.raises(ImportError, match=r"ZeroModifier.*division by zero") as raised:
        ModifierFactory.create("ZeroModifier")
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


def test_a_registration_beats_a_module_that_cannot_be_imported(package):
    package(pruning=BROKEN)
    ModifierFactory.register("SubtleModifier", MineModifier)
    assert type(ModifierFactory.create("SubtleModifier")) is MineModifier


def test_a_mended_module_is_imported_the_next_time(package):
    package(pruning=BROKEN)
    with pytest.raises(ImportError):
        ModifierFactory.create("SubtleModifier")
    package(pruning=PLAIN.replace("PlainModifier", "SubtleModifier") + "\n")
    assert ModifierFactory.create("SubtleModifier").strength == 1.0


def test_a_name_imports_its_own_module_alone(package):
    name = package(plain=PLAIN, inner__in__other=PLAIN.replace("Plain", "Other"), pruning=BROKEN)
    ModifierFactory.create("OtherModifier")
    assert {n for n in sys.modules if n.startswith(f"{name}.")} == {f"{name}.inner", f"{name}.inner.other"}


# -- packages and plug-ins -------------------------------------------------------------------------------------------


def test_load_from_package_takes_concrete_modifiers_of_that_package_only(package):
    name = package(
        plain=PLAIN,
        mixed="""
            from lightning_compress.core import Modifier
            from core_like import MineModifier
            class AbstractModifier(Modifier): pass
            class Oddly(Modifier):
                def on_initialize(self, state, **kwargs): return True
            class NoModifier: pass
            notaModifier = 3
        """,
    )
    sys.modules["core_like"] = sys.modules[__name__]
    try:
        assert set(ModifierFactory.load_from_package(name)) == {"PlainModifier"}
    finally:
        del sys.modules["core_like"]


def test_load_from_package_walks_into_folders(package):
    name = package(inner__in____init__="", inner__in__deep=PLAIN)
    assert set(ModifierFactory.load_from_package(name)) == {"PlainModifier"}


def test_load_from_package_warns_of_a_module_that_cannot_be_imported(package):
    name = package(plain=PLAIN, pruning=BROKEN)
    text = f"{name}.pruning failed to import, its modifiers are left out: No module named 'a_package_that_is_not_there'"
    with pytest.warns(UserWarning, match=text):
        assert set(ModifierFactory.load_from_package(name)) == {"PlainModifier"}


def plug_in(monkeypatch, value: str) -> None:
    point = EntryPoint("PlugModifier", value, module.ENTRY_POINTS)
    points = {"lightning_compress.modifiers": [point]}
    monkeypatch.setattr(module, "entry_points", lambda group: points.get(group, []))


def test_a_plug_in_is_found_through_its_entry_point(package, monkeypatch):
    name = package(plain=PLAIN)
    plug_in(monkeypatch, f"{name}.plain:PlainModifier")
    assert type(ModifierFactory.create("PlugModifier")).__name__ == "PlainModifier"
    with pytest.raises(ValueError, match="no modifier of type 'PlugModifier' found; did you mean PlainModifier"):
        ModifierFactory.create("PlugModifier", allow_experimental=False)


@pytest.mark.parametrize("value", ["nowhere_at_all:X", "lightning_compress.core:Missing"])
def test_a_plug_in_that_cannot_be_imported(package, monkeypatch, value):
    package(plain=PLAIN)
    plug_in(monkeypatch, value)
    assert ModifierFactory.create("PlainModifier")
    with pytest.raises(ImportError, match=rf"the plug-in 'PlugModifier' \({value}\) failed to import") as raised:
        ModifierFactory.create("PlugModifier")
    assert raised.value.__cause__ is not None


def test_a_plug_in_that_is_no_modifier(package, monkeypatch):
    package(plain=PLAIN)
    plug_in(monkeypatch, "builtins:int")
    with pytest.raises(ValueError, match="'PlugModifier': expected a subclass of Modifier, got <class 'int'>"):
        ModifierFactory.create("PlugModifier")
