"""summary.json and modules.csv."""

import csv
import json
from dataclasses import fields
from pathlib import Path

import pytest

from lightning_compress.core.ledger import Ledger, Row
from lightning_compress.report import summary


def test_the_summary_holds_what_a_run_must_tell(tmp_path, ledger, facts):
    summary.write(tmp_path / "report", ledger, facts)
    read = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert {k: read[k] for k in facts} == facts
    assert read["modules"] == 9
    assert read["params"] == 4 * 4000 + 8000
    assert read["bytes_before"] == 2 * 24000
    assert read["bytes_after"] == 4 * (500 + 32 + 1500 + 32) + 8500
    assert read["bits_per_weight"] == pytest.approx((16000 * 4.25 + 8000 * 8.5) / 24000)
    assert read["flags"] == {"fell back to rounding": ["layers.0.q_proj"]}
    assert {"python", "torch", "compressed-tensors"} <= read["versions"].keys()


def test_files_of_modifiers_are_in_the_folder(tmp_path, ledger, facts):
    ledger.files["allocation.yaml"] = "config_groups: {}\n"
    summary.write(tmp_path, ledger, facts)
    assert (tmp_path / "allocation.yaml").read_text() == "config_groups: {}\n"


def test_facts_win_over_what_the_ledger_adds_up_to(tmp_path, ledger):
    """The caller knows the whole model, the ledger only the modules that were touched."""
    summary.write(tmp_path, ledger, {"bytes_before": 10**6, "versions": {"torch": "x"}, "global_step": 7})
    read = json.loads((tmp_path / "summary.json").read_text())
    assert (read["bytes_before"], read["versions"], read["global_step"]) == (10**6, {"torch": "x"}, 7)


def test_a_module_with_two_techniques_counts_once():
    ledger = Ledger()
    ledger.add("a", "magnitude", sparsity=0.5, params=100)
    ledger.add("a", "gptq", bits=4.0, params=100, bytes_before=200, bytes_after=50)
    ledger.add("a", "constant pruning", sparsity=0.5)
    found = summary.totals(ledger)
    assert found == {
        "modules": 1, "params": 100, "bytes_before": 200, "bytes_after": 50, "bits_per_weight": 4.0, "sparsity": 0.5,
        "flags": {},
    }  # fmt: skip


def test_nothing_is_made_up_for_an_empty_ledger(tmp_path):
    summary.write(tmp_path, Ledger(), {})
    read = json.loads((tmp_path / "summary.json").read_text())
    assert read["modules"] == 0
    assert read["bits_per_weight"] is read["bytes_after"] is read["params"] is None
    assert (tmp_path / "modules.csv").read_text().count("\n") == 1


def test_the_csv_gives_back_every_row(tmp_path, ledger):
    ledger.add("a, with comma", "rtn", flag="one")
    ledger.add("a, with comma", "rtn", flag='two "quoted"')
    summary.write(tmp_path, ledger, {})
    with (tmp_path / "modules.csv").open(newline="") as file:
        table = csv.DictReader(file)
        assert table.fieldnames == [f.name for f in fields(Row)]
        read = list(table)
    assert [r["module"] for r in read] == [row.module for row in ledger]
    for written, row in zip(read, ledger, strict=True):
        assert float(written["error"] or "nan") == pytest.approx(row.error or float("nan"), nan_ok=True)
        assert written["params"] == ("" if row.params is None else str(row.params))
    assert read[-1]["flags"] == 'one; two "quoted"'


def test_what_json_does_not_know_becomes_text(tmp_path):
    facts = {"metric": {"perplexity": {"before": 1.0, "after": float("inf"), "difference": float("nan")}},
             "export_dir": Path("a/b"), "pair": (1, 2), 3: True}  # fmt: skip
    summary.write(tmp_path, Ledger(), facts)
    text = (tmp_path / "summary.json").read_text()
    read = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert read["metric"]["perplexity"] == {"before": 1.0, "after": "inf", "difference": "nan"}
    assert (read["export_dir"], read["pair"], read["3"]) == (str(Path("a/b")), [1, 2], True)


def test_a_second_run_replaces_the_files(tmp_path, ledger, facts):
    summary.write(tmp_path, Ledger(), {})
    summary.write(tmp_path, ledger, facts)
    assert json.loads((tmp_path / "summary.json").read_text())["modules"] == 9
    assert sorted(p.name for p in tmp_path.iterdir()) == ["modules.csv", "summary.json"]


def test_sparsity_is_that_of_the_modules_that_report_one():
    ledger = Ledger()
    ledger.add("a", "magnitude", sparsity=0.5, params=300)
    ledger.add("b", "magnitude", sparsity=0.1, params=100)
    ledger.add("a", "rtn", bits=4.0, params=300)
    assert summary.totals(ledger)["sparsity"] == pytest.approx(0.4)
