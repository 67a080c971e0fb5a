"""What a class may declare as its needs, and what it is told where it declares something else."""

import re
from dataclasses import FrozenInstanceError, fields
from typing import ClassVar

import pytest
from pydantic import BaseModel

from lightning_compress.core import Modifier, Needs
from lightning_compress.core.needs import OLD_NAMES


class Plain(Modifier):
    def on_initialize(self, state, **kwargs):
        return True


def test_without_a_declaration_nothing_is_needed():
    assert Plain().needs == Needs()
    named = {"fixed_shapes_from": "never", "team": "alone"}
    assert not any(getattr(Needs(), field.name) for field in fields(Needs) if field.name not in named)
    assert {name: getattr(Needs(), name) for name in named} == named


@pytest.mark.parametrize("name", ["data", "survey", "replay", "dense_outputs", "hand_over"])
def test_what_only_calibration_gives_implies_calibration(name):
    assert Needs(**{name: True}).calibration


@pytest.mark.parametrize("name", ["one_pass", "own_pass", "checkpoint_state", "changes_shapes", "parametrizes"])
def test_other_needs_do_not_imply_calibration(name):
    assert not Needs(**{name: True}).calibration


def test_needs_are_frozen_and_unknown_ones_are_refused():
    with pytest.raises(FrozenInstanceError):
        Needs().data = True
    with pytest.raises(TypeError, match="dta"):
        Needs(dta=True)


def test_a_class_declares_its_needs_with_or_without_an_annotation():
    class Annotated(Plain):
        needs: ClassVar[Needs] = Needs(data=True)

    class Bare(Plain):
        needs = Needs(data=True, one_pass=True)

    class Inherited(Bare):
        targets: list[str] = []

    assert Annotated().needs == Needs(calibration=True, data=True)
    assert Bare().needs == Inherited().needs == Needs(data=True, one_pass=True)
    assert "needs" not in Bare.model_fields


def test_needs_may_depend_on_arguments():
    class Depending(Plain):
        needs = Needs(own_pass=True)

    class Choosing(Depending):
        learn: bool = False

        @property
        def needs(self):
            return Needs(calibration=True, data=self.learn)

    assert not Choosing().needs.data
    assert Choosing(learn=True).needs.data


def test_a_mixin_does_not_hide_what_is_declared():
    class Arguments(BaseModel):
        ratio: float = 0.5

    class Mixed(Arguments, Plain):
        needs = Needs(changes_shapes=True)

    assert Mixed(ratio=0.1).needs.changes_shapes


@pytest.mark.parametrize(("old", "field"), OLD_NAMES.items())
def test_a_name_of_earlier_versions_is_refused_where_the_class_is_made(old, field):
    message = (
        f"Old declares {old}, which nothing reads any more; write needs = Needs({field}=...) in the class, from "
        f"lightning_compress.core import Needs"
    )
    for value in (True, property(lambda self: True)):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            type(Plain)("Old", (Plain,), {"__module__": __name__, old: value})
    assert field in {f.name for f in fields(Needs)}


def test_all_old_names_of_a_class_are_named_at_once():
    with pytest.raises(ValueError, match=r"needs_calibration, needs_data, .*Needs\(calibration=..., data=...\)"):

        class Old(Plain):
            needs_calibration: ClassVar[bool] = True

            @property
            def needs_data(self):
                return True


@pytest.mark.filterwarnings("ignore:Field name")
def test_needs_as_an_argument_are_refused():
    with pytest.raises(ValueError, match=r"Wrong: needs is not an argument; write needs: ClassVar\[Needs\] = Needs"):

        class Wrong(Plain):
            needs: Needs = Needs(data=True)


def test_a_window_that_would_do_nothing_is_refused():
    class Walking(Plain):
        needs = Needs(data=True)

    class Starting(Walking):
        def on_start(self, state, event, **kwargs):
            pass

    class Windowless(Starting):
        needs = Needs(data=True, window=False)

    for cls in (Walking, Windowless):
        with pytest.raises(ValueError, match=f"{cls.__name__}: start=1 would do nothing"):
            cls(start=1)
    assert Starting(start=1).start == Plain(start=1).start == 1
