"""The model card: what stands in it, that equal models give equal cards, and that a user's text is not lost."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaForCausalLM

from lightning_compress import QuantizationModifier, RotationModifier, compress, load, save
from lightning_compress.export.save import write_compressed_tensors
from tests.support.rotation_models import build

RECIPE = {"modifiers": {"rtn": {"type": "QuantizationModifier", "scheme": "W4A16"}}}
RUN = {"run": "a", "metric": {"val/loss": {"before": 2.5, "after": 2.75, "difference": 0.25, "standard_error": 0.031}}}


def quantized(model=None, **arguments):
    model = build("llama") if model is None else model
    compress(model, QuantizationModifier(**{"scheme": "W4A16", "group_size": 16, "ignore": ["lm_head"]} | arguments))
    return model


def read(folder: Path) -> tuple[dict, str]:
    """The YAML at the top, and the text."""
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def table(text: str, first: str) -> dict[str, list[str]]:
    """Rows of the table whose header begins so, by their first cell."""
    lines = text.split(f"| {first} |", 1)[1].splitlines()[2:]
    rows = [line.strip("| ").split(" | ") for line in lines[: lines.index("")]]
    return {row[0]: row[1:] for row in rows}


def test_a_card_says_what_a_user_asks(tmp_path):
    model = quantized()
    dense = sum(p.nbytes for p in {id(p): p for p in model.parameters()}.values())
    write_compressed_tensors(model, tmp_path / "out", recipe=RECIPE, origin=RUN)
    front, text = read(tmp_path / "out")
    assert front == {"library_name": "transformers", "tags": ["compressed-tensors", "lightning-compress"]}
    size, files = table(text, "")["weights"], (tmp_path / "out" / "model.safetensors").stat().st_size
    assert float(size[0].removesuffix(" KB")) == pytest.approx(dense / 1000, rel=1e-3)
    assert 0.8 * files < 1000 * float(size[1].removesuffix(" KB")) < files  # which holds names, too
    assert table(text, "")["`val/loss`"] == ["2.5", "2.75 (+0.25 ± 0.031)"]
    assert table(text, "scheme")["`W4A16 g16 sym`"][0] == "14"
    assert "`model.layers.*.mlp.up_proj`" in table(text, "scheme")["`W4A16 g16 sym`"][1]
    assert "Not quantized: `model.embed_tokens`, `lm_head`." in text
    assert {row: cells[0] for row, cells in table(text, "reader").items()} == dict.fromkeys(
        ["`lightning_compress.load`", "transformers", "vLLM"], "yes"
    )
    assert "vllm serve FOLDER" in text
    assert yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1]) == RECIPE
    assert str(tmp_path) not in text


def test_the_code_of_a_card_runs(tmp_path):
    model = quantized()
    save(model, tmp_path / "out")
    _, text = read(tmp_path / "out")
    for program in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        names: dict = {}
        exec(program.replace("FOLDER", str(tmp_path / "out")), names)
        assert isinstance(names["model"], LlamaForCausalLM)


def test_a_reloaded_model_gives_the_same_card(tmp_path):
    save(quantized(), tmp_path / "out")
    for packed in (None, False):
        save(load(tmp_path / "out", packed=packed), tmp_path / f"again_{packed}")
        assert read(tmp_path / f"again_{packed}") == read(tmp_path / "out")


def test_base_and_license_come_from_the_hub_cache_or_the_folder(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    snapshot = cache / "models--org--small" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (cache / "models--org--small" / "refs").mkdir()
    (cache / "models--org--small" / "refs" / "main").write_text("0" * 40)
    build("llama").save_pretrained(snapshot)
    (snapshot / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: other/ancestor\n---\n# Small\n")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(cache), raising=False)
    model = quantized(LlamaForCausalLM.from_pretrained("org/small", local_files_only=True, cache_dir=cache))
    save(model, tmp_path / "out")
    front, text = read(tmp_path / "out")
    assert front["base_model"] == "org/small"
    assert front["base_model_relation"] == "quantized"
    assert front["license"] == "apache-2.0"
    assert text.startswith("\n# org/small, compressed\n")
    save(load(tmp_path / "out"), tmp_path / "again")  # from a folder: its card names the base
    assert read(tmp_path / "again")[0] == front
    assert str(tmp_path) not in (tmp_path / "again" / "config.json").read_text()
    model.config._name_or_path = "models/small"  # a folder that is not there now looks like a repository
    save(model, tmp_path / "unknown")
    assert not read(tmp_path / "unknown")[0].keys() & {"base_model", "license"}


@pytest.mark.parametrize(
    "readme",
    [
        "no front matter",
        "---\n- a\n---\n",
        "---\na: [\n---\n",
        "---\nlicense: {a: 1}\nbase_model: ../up\n---\n",
        b"\xff",
    ],
    ids=["text", "list", "broken", "kinds", "bytes"],
)
def test_what_is_not_a_card_is_not_believed(tmp_path, readme):
    build("llama").save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "README.md").write_bytes(readme if isinstance(readme, bytes) else readme.encode())
    save(quantized(LlamaForCausalLM.from_pretrained(tmp_path / "base")), tmp_path / "out")
    assert read(tmp_path / "out")[0].keys() == {"library_name", "tags"}


def test_an_edited_card_stays_when_its_run_replaces_the_export(tmp_path):
    model, out = quantized(), tmp_path / "out"
    write_compressed_tensors(model, out, origin=RUN)
    card = (out / "README.md").read_bytes()
    write_compressed_tensors(model, out, origin=RUN, overwrite=True)
    assert (out / "README.md").read_bytes() == card
    edited = card.decode().replace("## How to load it", "Made for the demo.\n\n## How to load it")
    (out / "README.md").write_text(edited)
    with pytest.warns(UserWarning, match=r"README.md was edited, and stays; the card of this export is MODEL_CARD.md"):
        write_compressed_tensors(model, out, origin=RUN, overwrite=True)
    assert (out / "README.md").read_text() == edited
    assert (out / "MODEL_CARD.md").read_bytes() == card
    assert {"README.md", "MODEL_CARD.md"} <= set(json.loads((out / "export_manifest.json").read_text())["files"])


def test_a_readme_of_a_processor_stays(tmp_path):
    class Processor:
        def save_pretrained(self, folder):
            Path(folder, "README.md").write_text("of the processor")

    save(quantized(), tmp_path / "out", tokenizer=Processor())
    assert (tmp_path / "out" / "README.md").read_text() == "of the processor"
    assert (tmp_path / "out" / "MODEL_CARD.md").read_text().startswith("---\n")


def test_other_models_get_a_card_that_says_how_to_build_them(tmp_path, small_net, quantize, scheme_of):
    quantize(small_net, scheme_of("W8A16", group_size=-1))
    save(small_net, tmp_path / "out")
    front, text = read(tmp_path / "out")
    assert front["library_name"] == "lightning-compress"
    assert 'lightning_compress.load("FOLDER", build())' in text
    assert "is not a model of transformers" in text
    assert "from_pretrained" not in text


def test_readers_that_fail_are_named_with_the_reason(tmp_path):
    save(quantized(scheme={"weights": {"num_bits": 3, "group_size": 16}}, group_size=None), tmp_path / "three")
    readers = table(read(tmp_path / "three")[1], "reader")
    assert readers["vLLM"] == ["no: 3 bits need a recent version, and a kernel for the GPU"]
    model = build("llama")
    torch.manual_seed(0)
    compress(model, [RotationModifier(rotations=["R1", "R4"], allow_online=True)])
    quantized(model)
    save(model, tmp_path / "turned")
    _, text = read(tmp_path / "turned")
    assert all("rotations run beside 2 modules" in table(text, "reader")[name][0] for name in ("transformers", "vLLM"))
    assert "from_pretrained" not in text
    assert "vllm serve" not in text


def test_a_failed_gate_stands_under_the_numbers(tmp_path):
    write_compressed_tensors(
        quantized(), tmp_path / "out", origin=RUN | {"gate": ["val/loss rose by 0.25, and 0.1 is allowed"]}
    )
    assert "\nIt failed its gate: val/loss rose by 0.25, and 0.1 is allowed.\n" in read(tmp_path / "out")[1]


def test_copies_of_a_folder_elsewhere_are_equal(tmp_path):
    """No path of the machine is in a card."""
    model = quantized()
    for place in ("here", "a/longer/place"):
        save(model, tmp_path / place / "out")
    assert (tmp_path / "here/out/README.md").read_bytes() == (tmp_path / "a/longer/place/out/README.md").read_bytes()
