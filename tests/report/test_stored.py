"""A report that is written and read back is the same."""

import pytest

from lightning_compress.core.ledger import Ledger
from lightning_compress.report import summary
from lightning_compress.report.stored import read_report


def make_ledger():
    ledger = Ledger()
    ledger.add("a.b", "gptq", scheme="W4A16 g32", error=1e-5, bits=4.5, params=64, bytes_before=256, bytes_after=36)
    ledger.add("a.b", "gptq", flag="never saw data")
    ledger.add("a.b", "gptq", flag="fell back to rounding")
    ledger.add("a.c", "wanda", sparsity=0.5, seconds=0.25, tokens=7)
    return ledger


def test_the_ledger_and_the_facts_come_back(tmp_path):
    facts = {"model": "Net", "seconds": {"calibration": 1.5}, "versions": {"python": "3"}}
    ledger = make_ledger()
    summary.write(tmp_path, ledger, facts)
    again, known = read_report(tmp_path)
    assert again.state_dict() == ledger.state_dict()
    assert {key: known[key] for key in facts} == facts
    assert known["modules"] == 2


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("summary.json", "{", "summary.json cannot be read as JSON"),
        ("summary.json", "[]", "summary.json holds a list, expected an object"),
        ("modules.csv", "module,technique,x\na,b,c\n", "modules.csv is not a table of modules: KeyError: 'x'"),
        ("modules.csv", "module,technique,bits\na,b,c\n", "modules.csv is not a table of modules: ValueError"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, text, message):
    summary.write(tmp_path, make_ledger(), {})
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_report(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=f"has no {name}; expected the folder of a report, or of a run"):
        read_report(tmp_path)
