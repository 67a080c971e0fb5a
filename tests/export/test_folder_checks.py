"""Checks of a folder: each fault is found by the check for it, and nothing in a folder is executed."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_compress import QuantizationModifier, compress, save
from lightning_compress.export import verify
from lightning_compress.export.folder_checks import check_folder, differences


@pytest.fixture
def folder(tmp_path, tiny_llama, monkeypatch):
    """An export; the process of plain transformers is left out here."""
    model = tiny_llama()
    compress(model, QuantizationModifier(scheme="W4A16", group_size=32, ignore=["lm_head"]))
    monkeypatch.setattr(verify, "answers", lambda *_: (0.0, ""))
    return save(model, tmp_path / "out")


def results(folder, **arguments):
    return {check.name: (check.passed, check.note) for check in check_folder(folder, **arguments)}


def change_tensor(folder, ending, change):
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith(ending))
    change(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return name


def test_a_right_folder(folder):
    checks = results(folder)
    assert [passed for passed, _ in checks.values()] == [True] * 5
    assert checks["shapes"][1].startswith("those of a LlamaForCausalLM with this config; 14 modules")
    assert checks["codes"][1] == "loaded and saved again, all tensors have the same bytes"
    (folder / "notes.md").write_text("mine")
    assert results(folder)["files"][1].endswith("; besides 'notes.md'")


@pytest.mark.parametrize("name", ["model.bin", "modeling.py", "sub/weights.pt"])
def test_code_and_pickles_end_the_checks(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("raise SystemExit('executed')")
    assert results(folder) == {
        "files": (False, f"{name!r}: code and pickles are never read; remove them if you do not need them")
    }


def test_foreign_code_is_not_run(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "x--y.Z"}}))
    assert results(folder) == {
        "files": (False, "config.json names code of its own (auto_map), which is never run; remove that key")
    }


def test_files_that_are_missing(folder):
    (folder / "generation_config.json").unlink()
    message = "'generation_config.json' missing, which export_manifest.json lists; copy the folder again"
    assert results(folder) == {"files": (False, message)}
    (folder / "export_manifest.json").unlink()
    assert results(folder)["files"][0] is False


def test_a_tensor_that_is_not_finite(folder):
    name = change_tensor(folder, "norm.weight", lambda t: t.view(-1)[:1].fill_(math.nan))
    assert results(folder)["tensors"] == (False, f"NaN or infinity in {name!r}")


def test_a_tensor_of_another_shape(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 160}))
    checks = results(folder)
    assert list(checks) == ["files", "tensors", "shapes"]
    assert checks["shapes"][0] is False


def test_codes_out_of_their_range(tmp_path, tiny_llama, monkeypatch):
    """7 bits in int8: 100 is not a code."""
    monkeypatch.setattr(verify, "answers", lambda *_: (0.0, ""))
    model = tiny_llama()
    weights = {"num_bits": 7, "type": "int", "symmetric": True, "strategy": "channel"}
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    groups = {"w": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}}
    compress(model, QuantizationModifier(config_groups=groups))
    folder = save(model, tmp_path / "out")
    assert results(folder)["codes"][0] is True
    name = change_tensor(folder, "q_proj.weight", lambda t: t.view(-1)[:1].fill_(100))
    where = f"{name.removesuffix('.weight')!r}: 1 of 16384 weights do not lie on the grid of its record"
    assert results(folder)["codes"] == (False, f"codes out of their range: {where}")


def test_outputs_beside_the_dense_model(folder, tmp_path, tiny_llama):
    tiny_llama().save_pretrained(tmp_path / "dense")
    ids = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))
    passed, note = results(folder, dense=tmp_path / "dense", batches=[{"input_ids": ids}])["dense"]
    assert passed
    assert "KL " in note
    assert "perplexity " in note
    assert "perplexity" not in results(folder, dense=tmp_path / "dense")["dense"][1]
    assert results(folder, dense=folder)["dense"][1].endswith("start from the folder of the dense model")


def test_a_model_that_transformers_does_not_have(tmp_path):
    folder = save(nn.Linear(4, 4), tmp_path / "out")
    checks = results(folder)
    assert [passed for passed, _ in checks.values()] == [True, True, None]
    assert checks["model"][1] == "not of transformers: build the dense model, and call load(folder, model)"


def test_differences_of_logits_are_those_of_the_definitions():
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(2, 5, 7, generator=generator) for _ in range(2))
    tokens = torch.randint(7, (2, 5), generator=generator)
    measured = differences([q[:1], q[1:]], [p[:1], p[1:]], [tokens[:1], tokens[1:]])
    kl, same, losses = [], 0, []
    for row in range(2):
        for place in range(5):
            a, b = p[row, place].double().softmax(-1), q[row, place].double().softmax(-1)
            kl.append(float((a * (a / b).log()).sum()))
            same += int(a.argmax() == b.argmax())
            if place < 4:
                losses.append(-math.log(b[tokens[row, place + 1]]))
    assert measured["kl"] == pytest.approx(sum(kl) / 10, rel=1e-5)
    assert measured["same_token"] == pytest.approx(same / 10)
    assert measured["perplexity"] == pytest.approx(math.exp(sum(losses) / 8), rel=1e-5)
