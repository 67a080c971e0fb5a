"""A table on the screen: cells are text and not markup."""

import io

import pytest
from rich.console import Console

from lightning_compress.report.section import Section, number, print_section, size


def test_brackets_are_text():
    text = io.StringIO()
    section = Section("[bold]", ["job", "size"], [["[smoothquant,gptq_w8a8]", "[/x]"]], words=["job"])
    print_section(Console(file=text, width=60), section)
    title, header, _, row = [line.rstrip() for line in text.getvalue().splitlines() if line]
    assert title == "[bold]"
    assert header.split() == ["job", "size"]
    assert row.split() == ["[smoothquant,gptq_w8a8]", "[/x]"]


@pytest.mark.parametrize(
    ("value", "text"), [(None, ""), (0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 1024**5, "3072 TiB")]
)
def test_sizes_are_in_powers_of_1024(value, text):
    assert size(value) == text


def test_numbers():
    assert [number(value) for value in (None, 1.23456, "nan", 7)] == ["", "1.235", "nan", "7"]
    assert number(0.5, "+") == "+0.5"
    assert number(1.23456, digits=2) == "1.2"
