"""The top of the package: names that load when they are first used, the same ones that type checkers see."""

import ast
from pathlib import Path

import pytest

import lightning_compress
from lightning_compress import modifiers


def test_every_name_loads():
    assert set(modifiers.__all__) < set(lightning_compress.__all__)
    for name in lightning_compress.__all__:
        assert getattr(lightning_compress, name).__name__ == name
        assert name in dir(lightning_compress)


def test_a_star_brings_them_all():
    names = {}
    exec("from lightning_compress import *", names)
    assert set(lightning_compress.__all__) <= set(names)


def test_type_checkers_see_the_names_that_load():
    block = next(n for n in ast.parse(Path(lightning_compress.__file__).read_text()).body if isinstance(n, ast.If))
    homes = {alias.name: n.module for n in block.body for alias in n.names}
    assert homes.pop("*") == "lightning_compress.modifiers"
    assert homes == {name: f"lightning_compress.{home}" for name, home in lightning_compress._HOME.items()}


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(
        AttributeError, match="module 'lightning_compress' has no attribute 'GPTQ'; it has AWQModifier, "
    ):
        lightning_compress.GPTQ  # noqa: B018
