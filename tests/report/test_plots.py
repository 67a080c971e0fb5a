"""The figure of errors; matplotlib is optional."""

import builtins
import logging

import pytest

from lightning_compress.core.ledger import Ledger
from lightning_compress.report import plots


def test_a_png_and_nothing_else(tmp_path, ledger):
    pytest.importorskip("matplotlib")
    path = plots.error_per_module(ledger, tmp_path / "deep" / "error.png")
    assert path == tmp_path / "deep" / "error.png"
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [0.0, 1e-9])
def test_many_modules_and_errors_of_zero(tmp_path, error):
    pytest.importorskip("matplotlib")
    ledger = Ledger()
    for i in range(120):
        ledger.add(f"blocks.{i}", "gptq", error=error if i % 2 else 0.0)
    assert plots.error_per_module(ledger, tmp_path / "error.png").stat().st_size > 1000


def test_nothing_to_draw(tmp_path):
    ledger = Ledger()
    ledger.add("a", "freeze")
    assert plots.error_per_module(ledger, tmp_path / "error.png") is None
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_one_line_says_so(tmp_path, ledger, monkeypatch, caplog):
    real = builtins.__import__

    def no_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    with caplog.at_level(logging.INFO):
        assert plots.error_per_module(ledger, tmp_path / "error.png") is None
    assert [record.getMessage() for record in caplog.records] == [
        "no figure of errors: matplotlib is missing; pip install 'lightning-compress[plot]'"
    ]
    assert list(tmp_path.iterdir()) == []


def test_kinds_are_the_last_word_of_a_name(ledger):
    assert [plots._kind(row) for row in ledger][:2] == ["q_proj (gptq)", "down_proj (gptq)"]
    ledger = Ledger()
    ledger.add("blocks.3", "rtn")
    ledger.add("0", "rtn")
    assert [plots._kind(row) for row in ledger] == ["blocks (rtn)", "0 (rtn)"]


def test_many_modules_are_named_by_their_blocks(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    ledger = Ledger()
    for block in range(12):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            ledger.add(f"model.layers.{block}.self_attn.{name}", "gptq", error=0.01)
    ledger.add("lm_head", "gptq", error=0.02)
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **kwargs: figures.append(self) or path.write_bytes(b""))
    plots.error_per_module(ledger, tmp_path / "error.png", "gptq_w4 of LlamaForCausalLM")
    (axes,) = figures[0].axes
    assert axes.get_title() == "gptq_w4 of LlamaForCausalLM"
    assert axes.get_ylabel() == "relative error |(W - Q) X|² / |W X|²"
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == [*(f"layers.{block}" for block in range(12)), "lm_head"]
    assert [round(place) for place in axes.get_xticks()] == [*range(0, 48, 4), 48]
