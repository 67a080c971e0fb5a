"""The report on the screen: the same cells plain and by rich."""

import builtins
import io
import re

import pytest

from lightning_compress.core.ledger import Ledger
from lightning_compress.report import table


def lines_of(text: str, title: str) -> list[str]:
    """Lines of the section called ``title``, header first."""
    block = text.split(f"\n{title}\n")[1].split("\n\n")[0]
    return [line for line in block.splitlines() if not set(line) <= set("- ")]


def test_the_metric_before_and_after_with_its_paired_error(ledger, facts):
    header, row = lines_of(table.render(ledger, facts), "gptq_w4 of LlamaForCausalLM")
    assert re.split(r"\s{2,}", header) == ["metric", "before", "after", "difference ± standard error"]
    assert re.split(r"\s{2,}", row.strip()) == ["perplexity", "5.3", "5.3125", "+0.0125 ± 0.0031"]


def test_each_technique_and_the_total(ledger, facts):
    header, gptq, rtn, total = (re.split(r"\s{2,}", line) for line in lines_of(table.render(ledger, facts), "modules"))
    assert header[2:7] == ["modules", "weights", "bits/weight", "before", "after"]
    assert gptq == ["gptq", "W4A16 g128", "8", "16 K", "4.25", "31.25 KiB", "8.062 KiB", "0.007", "0.04", "4"]
    assert rtn[:5] == ["rtn", "W8A16", "1", "8 K", "8.5"]
    assert total == ["total", "9", "24 K", "5.667", "46.88 KiB", "16.36 KiB", "4"]


def test_the_worst_modules_come_first_and_only_five(ledger, facts):
    rows = lines_of(table.render(ledger, facts), "largest errors")[1:]
    assert [row.split()[0] for row in rows] == [
        "lm_head", "layers.3.down_proj", "layers.2.down_proj", "layers.1.down_proj", "layers.0.down_proj",
    ]  # fmt: skip
    assert rows[1].split()[1:] == ["gptq", "0.04", "17"]


def test_every_flag_is_told(ledger, facts):
    for block in range(4):
        ledger.add(f"layers.{block}.down_proj", "gptq", flag="never saw data")
    text = table.render(ledger, facts)
    assert "\nfell back to rounding: layers.0.q_proj\n" in text
    assert "\nnever saw data: layers.0.down_proj, layers.1.down_proj, layers.2.down_proj and 1 more\n" in text


def test_the_notes(ledger, facts):
    assert table.render(ledger, facts).endswith(
        "\nwhole model: 8 MiB -> 3 MiB\nseconds: calibration 12.5, export 0.25\npeak memory: 3 GiB\n"
        "compressed model: compressed\n"
    )


def test_what_is_unknown_is_left_out():
    assert table.render(Ledger(), {}) == "\n"
    ledger = Ledger()
    ledger.add("a", "freeze")
    text = table.render(ledger, {"metric": {"accuracy": {"before": 0.5, "after": 0.25}}, "recipe": {"a": 1}})
    assert "None" not in text
    assert "largest errors" not in text
    assert lines_of(text, "metric")[1].split() == ["accuracy", "0.5", "0.25", "-0.25"]
    assert "total" not in text                          # of one line it would say the same again


def test_no_trailing_blanks(ledger, facts):
    assert all(line == line.rstrip() for line in table.render(ledger, facts).splitlines())


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_rich_shows_the_same_cells(ledger, facts, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "200")
    screen = Terminal()
    table.show(ledger, facts, screen)
    text = re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue())
    assert "│" in text
    for line in table.render(ledger, facts).splitlines():
        for cell in re.split(r"\s{2,}", line):
            assert set(cell) <= set("- ") or cell in text, cell


def test_a_log_gets_plain_text_and_so_does_a_terminal_without_rich(ledger, facts, monkeypatch):
    log = io.StringIO()
    table.show(ledger, facts, log)
    assert log.getvalue() == table.render(ledger, facts)

    real = builtins.__import__

    def no_rich(name, *args, **kwargs):
        if name.startswith("rich"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_rich)
    screen = Terminal()
    table.show(ledger, facts, screen)
    assert screen.getvalue() == table.render(ledger, facts)
