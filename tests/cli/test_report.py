"""``lightning-compress report``: the table that the run printed, from its folder."""

import pytest

from lightning_compress.cli import main
from lightning_compress.core.ledger import Ledger
from lightning_compress.report import summary, table


@pytest.mark.parametrize(
    ("written", "asked"), [("run/report", "run"), ("run/report", "run/compressed"), ("w4-report", "w4"), ("x", "x")]
)
def test_the_report_is_found_printed_and_written_again(tmp_path, capsys, written, asked):
    ledger = Ledger()
    ledger.add("a.b", "gptq", scheme="W4A16 g32", error=1e-5, bits=4.5, params=64, bytes_before=256, bytes_after=36)
    facts = {"model": "Net", "recipe": "gptq_w4", "seconds": {"calibration": 1.5}, "seed": 0}
    summary.write(tmp_path / written, ledger, facts)
    (tmp_path / asked).mkdir(exist_ok=True)
    assert main(["report", str(tmp_path / asked)]) == 0
    page = tmp_path / written / "index.html"
    assert capsys.readouterr().out == f"{table.render(ledger, facts)}report: {page}\n"
    assert "gptq_w4 of Net" in page.read_text()


def test_no_report_is_exit_code_2(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert f"{tmp_path} has no report: expected summary.json in it, in report/, or" in capsys.readouterr().err
