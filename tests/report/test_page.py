import re
from html.parser import HTMLParser

import pytest

from lightning_compress.core.ledger import Ledger
from lightning_compress.report import page

FACTS = {
    "model": "Llama<b>",
    "recipe": "gptq_w3",
    "metric": {"perplexity": {"before": 5.5, "after": 5.75, "difference": 0.25, "standard_error": 0.0125}},
    "model_bytes_before": 4 * 2**20,
    "model_bytes_after": 2**20,
    "seconds": {"calibration": 12.5, "export": 0.5},
    "modifiers": {"GPTQModifier": {"type": "GPTQModifier", "ignore": ["re:.*lm_head"]}},
    "more_bits": {"gptq": {"16": "'callbacks.compress.modifiers.gptq.config_groups={W8A16:[MODULE]}'"}},
    "leave_dense": {"gptq": "'callbacks.compress.modifiers.gptq.ignore=[re:.*lm_head,MODULE]'"},
    "versions": {"torch": "2.13.0"},
    "plan": {"bytes_after": 2**20 - 2**17, "memory": {}, "seconds": {"calibration": 10.0}},
}


class Text(HTMLParser):
    """Tags with their attributes, and the text, of a page."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.parts = [], []
        self.feed(source)
        self.text = " ".join(" ".join(self.parts).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.parts.append(data)


def ledger(modules):
    rows = Ledger()
    for i in range(modules):
        facts = {"scheme": "W3A16 g64", "bits": 3.5, "params": 100, "bytes_before": 400, "bytes_after": 50}
        rows.add(f"model.layers.{i}.mlp.down_proj", "gptq", error=10.0 ** -(1 + i / 4), **facts)
    return rows


def with_blocks(modules):
    rows = ledger(modules)
    for i in range(modules):
        rows.blocks[f"model.layers.{i}"] = {"error": 1e-4 * 1.2**i, "standard_error": 1e-5 * 1.2**i, "rows": 8}
    return rows


@pytest.fixture
def source(tmp_path):
    page.write(tmp_path / "report", with_blocks(20), FACTS)
    return (tmp_path / "report" / "index.html").read_text()


def test_it_says_what_matters_at_the_top(source):
    text = Text(source).text
    for part in (
        "gptq_w3 of Llama<b>",
        "size 1 MiB of 4 MiB, 4.00 times smaller",
        "perplexity 5.75 before 5.5, change +0.25 ± 0.013",
        "bits per weight 3.5",
        "seconds 13 without training",
        "bytes of the export 896 KiB 1 MiB -12 %",
        "seconds of calibration 10 12.5 -20 %",
        "torch 2.13.0",
    ):
        assert part in text, part


def test_the_worst_modules_come_first_with_what_leaves_them_dense(source):
    names = re.findall(r"layers\.(\d+)\.mlp\.down_proj <span", source)
    assert names[: page.SHOWN] == [str(i) for i in range(page.SHOWN)]
    assert names[page.SHOWN :] == [str(i) for i in range(20)]
    expected = "'callbacks.compress.modifiers.gptq.ignore=[re:.*lm_head,model.layers.0.mlp.down_proj]'"
    assert expected in Text(source).text
    assert "{W8A16:[model.layers.0.mlp.down_proj]}'" in Text(source).text


def test_one_override_gives_more_bits_to_the_three_largest(source):
    names = ",".join(f"model.layers.{i}.mlp.down_proj" for i in range(3))
    text = f"8 bits for the largest 'callbacks.compress.modifiers.gptq.config_groups={{W8A16:[{names}]}}'"
    assert text in Text(source).text


def test_more_bits_are_offered_where_that_is_more(tmp_path):
    rows = Ledger()
    for name, scheme in [("a", "W8A16 channel sym"), ("b", "FP8 channel"), ("c", "W4A8 channel sym"), ("d", None)]:
        rows.add(name, "gptq", scheme=scheme, error=0.1)
    page.write(tmp_path, rows, FACTS)
    assert "8 bits<" not in (tmp_path / "index.html").read_text()


def test_bars_are_logarithmic(source):
    widths = [float(w) for w in re.findall(r'width: ([\d.]+)%"', source)][: page.SHOWN]
    assert widths[0] == 100
    assert widths[4] == pytest.approx(100 * (1 - 1 / page.DECADES), abs=0.1)


def test_the_error_of_each_block_is_drawn_and_listed(source):
    assert "mean of 8 rows" in source
    assert source.count("<circle") == 20
    assert "<title>model.layers.7: 0.0003583</title>" in source
    assert "model.layers.7 0.0003583 3.6e-05" in Text(source).text


def test_a_run_without_blocks_has_no_chart(tmp_path):
    page.write(tmp_path, ledger(3), FACTS)
    text = (tmp_path / "index.html").read_text()
    assert "<svg" not in text
    assert "dense model's" not in text


def test_it_needs_nothing_from_elsewhere_and_names_are_escaped(source):
    found = Text(source)
    assert not [tag for tag, attributes in found.tags if tag in ("script", "link", "img") or "src" in attributes]
    assert "http" not in source
    assert "Llama&lt;b&gt;" in source


def test_a_recipe_without_a_name_is_called_by_its_techniques(tmp_path):
    rows = ledger(2)
    rows.add("head", "rtn", error=0.1)
    page.write(tmp_path, rows, FACTS | {"recipe": {"modifiers": {}}})
    source = (tmp_path / "index.html").read_text()
    assert "<h1>gptq, rtn of Llama&lt;b&gt;</h1>" in source
    assert "<h2>Metric</h2>" in source


def test_a_run_that_knows_little_has_a_page(tmp_path):
    page.write(tmp_path, Ledger(), {})
    assert "<h1>compression</h1>" in (tmp_path / "index.html").read_text()
