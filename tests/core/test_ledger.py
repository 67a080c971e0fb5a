"""Facts that modifiers report, one row for each module and technique."""

import pytest

from lightning_compress.core import Ledger, Row


def test_later_facts_join_the_row_of_their_module_and_technique():
    ledger = Ledger()
    ledger.add("a", "gptq", error=0.5)
    ledger.add("b", "gptq", error=0.1)
    ledger.add("a", "rtn", error=0.7)
    row = ledger.add("a", "gptq", seconds=2.0, flag="retried")
    assert row == Row("a", "gptq", error=0.5, seconds=2.0, flags=["retried"])
    assert [(r.module, r.technique) for r in ledger] == [("a", "gptq"), ("b", "gptq"), ("a", "rtn")]
    assert len(ledger) == 3
    assert ledger.rows[0] == row


def test_a_flag_is_kept_once_and_rows_share_none():
    ledger = Ledger()
    for _ in range(2):
        ledger.add("a", "gptq", flag="never saw data")
    ledger.add("a", "gptq", flag="fell back to rounding")
    ledger.add("b", "gptq")
    assert [r.flags for r in ledger] == [["never saw data", "fell back to rounding"], []]


def test_an_unknown_fact_is_an_error():
    with pytest.raises(TypeError, match="sparsty"):
        Ledger().add("a", "gptq", sparsty=0.5)


def test_state_goes_through_a_weights_only_checkpoint(tmp_path):
    import torch

    ledger = Ledger()
    ledger.add("a", "gptq", error=0.5, tokens=12, flag="x")
    ledger.add("b", "rtn", bits=4.25)
    torch.save(ledger.state_dict(), tmp_path / "l.pt")
    again = Ledger()
    again.load_state_dict(torch.load(tmp_path / "l.pt", weights_only=True))
    assert again.rows == ledger.rows
    again.add("a", "gptq", seconds=1.0)
    assert len(again) == 2
    assert again.rows[0].error == 0.5
