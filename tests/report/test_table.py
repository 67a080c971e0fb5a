"""The report on the screen: the same cells plain and by rich."""

import io
import re

from lightning_compress.core.ledger import Ledger
from lightning_compress.report import table


def lines_of(text: str, title: str) -> list[str]:
    """Lines of the section called ``title``, header first."""
    block = text.split(f"\n{title}", 1)[1].split("\n", 1)[1].split("\n\n")[0]
    return [line for line in block.splitlines() if not set(line) <= set("─ ")]


def test_the_metric_before_and_after_with_its_paired_error(ledger, facts):
    header, row = lines_of(table.render(ledger, facts), "gptq_w4 of LlamaForCausalLM")
    assert re.split(r"\s{2,}", header) == ["metric", "before", "after", "difference ± standard error"]
    assert re.split(r"\s{2,}", row.strip()) == ["perplexity", "5.3", "5.3125", "+0.0125 ± 0.0031"]


def test_each_technique_and_the_total(ledger, facts):
    lines = [re.split(r"\s{2,}", line.strip()) for line in lines_of(table.render(ledger, facts), "modules")]
    above, header, gptq, rtn, total = lines
    assert above == ["median", "worst"]
    assert header == ["technique", "scheme", "modules", "bits", "before", "after", "error", "error"]
    assert gptq == ["gptq", "W4A16 g128", "8", "4.25", "31.25 KiB", "8.062 KiB", "0.007", "0.04"]
    assert rtn[:4] == ["rtn", "W8A16", "1", "8.5"]
    assert total == ["total", "9", "5.667", "46.88 KiB", "16.36 KiB"]


def test_what_training_compressed_is_shown_beside_the_dense_model(ledger, facts):
    facts["metric_dense"] = {"step": 200, "values": {"perplexity": 5.125}}
    header, row = lines_of(table.render(ledger, facts), "gptq_w4 of LlamaForCausalLM")
    assert re.split(r"\s{2,}", header) == ["metric", "dense, step 200", "trained", "after", "after - trained"]
    assert re.split(r"\s{2,}", row.strip()) == ["perplexity", "5.125", "5.3", "5.3125", "+0.0125 ± 0.0031"]


def test_everything_but_a_path_fits_80_columns_and_no_figure_is_broken(facts):
    ledger = Ledger()
    for block in range(30):
        ledger.add(
            f"model.layers.{block}.self_attn.q_proj", "gptq", scheme="W4A16 g128", error=1.5e-5 * (block + 1),
            sqnr_db=17.236, bits=4.254, params=10**7, bytes_before=2 * 10**7, bytes_after=6 * 10**6,
        )  # fmt: skip
    ledger.add("lm_head", "logarithmic_equalization", scheme="W8A8_ASYM tensor", error=0.5, bits=8.125, params=10**6)
    facts["metric"]["a_metric_with_a_long_name"] = facts["metric"]["perplexity"]
    text = table.render(ledger, facts)
    assert max(len(line) for line in text.splitlines() if not line.startswith("compressed model")) <= 80
    for figure in ("0.00045", "0.000435", "572.2 MiB", "171.7 MiB", "+0.0125 ± 0.0031", "17.24"):
        assert re.search(rf"(^|\s){re.escape(figure)}(\s|$)", text, re.MULTILINE), figure
    assert "model.layers.29.self_attn.q_proj " in text  # the worst, in one piece


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
        "\nmodel with all its weights: 8 MiB -> 3 MiB on disk\n"
        "seconds: calibration 12.5, export 0.25\npeak memory: 3 GiB\n"
        "compressed model: compressed\n"
    )


def test_the_seconds_break_between_words(ledger, facts):
    facts["seconds"] = {"load best": 0.02005, "metric before": 6.795, "calibration": 35.64, "metric after": 10.65}
    facts["export_dir"] = "/a/long/folder" * 8
    text = table.render(ledger, facts)
    assert "\nseconds: load best 0.02005, metric before 6.795, calibration 35.64, metric after\n10.65\n" in text
    assert text.endswith(f"\ncompressed model: {facts['export_dir']}\n")


def test_what_is_unknown_is_left_out():
    assert table.render(Ledger(), {}) == "\n"
    ledger = Ledger()
    ledger.add("a", "freeze")
    text = table.render(ledger, {"metric": {"accuracy": {"before": 0.5, "after": 0.25}}, "recipe": {"a": 1}})
    assert "None" not in text
    assert "largest errors" not in text
    assert lines_of(text, "metric")[1].split() == ["accuracy", "0.5", "0.25", "-0.25"]
    assert "total" not in text  # of one line it would say the same again


def test_no_trailing_blanks(ledger, facts):
    assert all(line == line.rstrip() for line in table.render(ledger, facts).splitlines())


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_the_same_cells(ledger, facts, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    screen = Terminal()
    table.show(ledger, facts, screen)
    text = re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue())
    for line in table.render(ledger, facts, width=200).splitlines():
        for cell in re.split(r"\s{2,}", line):
            assert set(cell) <= set("─ ") or cell in text, cell


def test_a_log_gets_plain_text(ledger, facts):
    log = io.StringIO()
    table.show(ledger, facts, log)
    assert log.getvalue() == table.render(ledger, facts)
    assert "\x1b" not in log.getvalue()


def test_what_pruning_left_out_is_on_the_screen():
    ledger = Ledger()
    ledger.add("a", "magnitude", sparsity=0.5, params=300)
    ledger.add("b", "magnitude", sparsity=0.1, params=100)
    ledger.add("a", "qat", scheme="W4A16", bits=4.5, params=300, bytes_before=1200, bytes_after=170)
    assert "\nzeros: 40 % of the weights of 2 pruned modules\n" in table.render(ledger, {})


def test_flags_that_differ_in_a_number_are_one_line():
    rows = Ledger()
    for i, flag in enumerate(["dense target 0.26", "dense target 1.00", "fell back to rounding", "dense target 0.50"]):
        rows.add(f"layers.{i}", "gptq", flag=flag)
    rows.add("model", "tune", flag="epoch 3")
    assert table.notes(rows, {}) == [
        "dense target 0.26 to 1.00: layers.0, layers.1, layers.3",
        "fell back to rounding: layers.2",
        "epoch 3: model",
    ]


def test_the_last_block_and_the_worst_one_are_named(ledger, facts):
    errors = [0.001, 0.25, 0.0125]
    ledger.blocks = {f"layers.{i}": {"error": e, "standard_error": e / 10, "rows": 8} for i, e in enumerate(errors)}
    ledger.blocks["layers.2"].pop("standard_error")
    assert table.notes(ledger, facts)[:3] == [
        "outputs of blocks against the dense model's, |y - d|² / |d|²:",
        "  layers.1 0.25 ± 0.025 (largest)",
        "  layers.2 0.0125",
    ]
    ledger.blocks.pop("layers.1")
    assert table.notes(ledger, facts)[1:2] == ["  layers.2 0.0125"]
