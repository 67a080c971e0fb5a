"""What save writes, for any module; and that a failure leaves nothing half-written."""

import builtins
import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from torch.testing import assert_close

import lightning_compress.export.tensors as tensors_module
from lightning_compress.export.load import load
from lightning_compress.export.save import save
from lightning_compress.quant.record import Quantized
from tests.support.export_models import all_files, conv_net

ROOT = Path(__file__).parents[2]


def test_the_live_model_does_not_change(tmp_path, small_net, quantize, scheme_of):
    quantize(small_net, scheme_of("W8A8"))
    before = copy.deepcopy(small_net.state_dict())
    attributes = {name: sorted(vars(module)) for name, module in small_net.named_modules()}
    schemes = {name: copy.deepcopy(record.scheme) for name, (_, record) in Quantized.find(small_net).items()}
    save(small_net, tmp_path / "out")
    assert_close(small_net.state_dict(), before, rtol=0, atol=0)
    assert attributes == {name: sorted(vars(module)) for name, module in small_net.named_modules()}
    assert schemes == {name: record.scheme for name, (_, record) in Quantized.find(small_net).items()}


def test_large_weights_go_into_several_files(tmp_path, small_net, tiny_llama, quantize, scheme_of):
    for name, model in {"any": small_net, "llama": tiny_llama()}.items():
        quantize(model, scheme_of("W8A8"))
        save(model, tmp_path / name, max_shard_bytes=4000)
        index = json.loads((tmp_path / name / "model.safetensors.index.json").read_text())
        files = sorted(tmp_path.glob(f"{name}/*.safetensors"))
        assert len(files) > 1
        assert {f.name for f in files} == set(index["weight_map"].values())
    again = load(tmp_path / "any", copy.deepcopy(small_net), packed=False)
    assert_close(again.state_dict(), small_net.state_dict(), rtol=0, atol=0)
    assert_close(load(tmp_path / "llama", packed=False).state_dict(), model.state_dict(), rtol=0, atol=0)


def test_two_saves_are_equal_byte_for_byte(tmp_path, small_net, tiny_llama, quantize, scheme_of):
    for name, model in {"any": small_net, "llama": tiny_llama()}.items():
        quantize(model, scheme_of("", num_bits=4, group_size=32, symmetric=False))
        for run in "ab":
            save(model, tmp_path / f"{name}_{run}", recipe={"rtn": {"targets": ["Linear"]}})
        assert all_files(tmp_path / f"{name}_a") == all_files(tmp_path / f"{name}_b")


def test_tokenizer_and_recipe_lie_beside_the_model(tmp_path, small_net, quantize, scheme_of):
    class Tokenizer:
        def save_pretrained(self, folder):
            (Path(folder) / "tokenizer.json").write_text("{}")

    recipe = {"b": {"scheme": "W8A8", "ignore": ["re:.*head"]}, "a": {"sparsity": 0.5}}
    save(quantize(small_net, scheme_of("W8A8")), tmp_path / "out", tokenizer=Tokenizer(), recipe=recipe)
    names = ["README.md", "config.json", "export_manifest.json", "model.safetensors", "recipe.yaml", "tokenizer.json"]
    assert sorted(os.listdir(tmp_path / "out")) == names
    read = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert (read, list(read)) == (recipe, ["b", "a"])


# -- bad input --------------------------------------------------------------------------------------------------------


def test_a_weight_changed_after_compression_is_named(tmp_path, small_net, quantize, scheme_of):
    quantize(small_net, scheme_of("W8A8"))
    small_net[2].weight.data[0, 0] += 1e-4
    with pytest.raises(RuntimeError, match="'2': 1 of 1024 weights do not lie on the grid"):
        save(small_net, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_not_empty(tmp_path, small_net, quantize, scheme_of):
    quantize(small_net, scheme_of("W8A8"))
    save(small_net, tmp_path / "out")
    with pytest.raises(ValueError, match="exists and is not empty"):
        save(small_net, tmp_path / "out")
    save(small_net, tmp_path / "out", overwrite=True)


def test_a_recipe_that_is_no_plain_data(tmp_path, small_net, quantize, scheme_of):
    quantize(small_net, scheme_of("W8A8"))
    with pytest.raises(ValueError, match="the recipe must hold plain"):
        save(small_net, tmp_path / "out", recipe={"a": object()})
    assert os.listdir(tmp_path) == []


def test_a_model_that_transformers_quantized(tmp_path, tiny_llama, quantize, scheme_of):
    from transformers import LlamaForCausalLM

    save(quantize(tiny_llama(), scheme_of("W4A16")), tmp_path / "out")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    Quantized(scheme_of("W4A16"), torch.ones(1)).attach(loaded.lm_head)
    with pytest.raises(ValueError, match=r"transformers quantized this model.*lightning_compress.load"):
        save(loaded, tmp_path / "again")


@pytest.mark.parametrize("where", ["model", "own", "config"])
def test_a_disk_that_runs_full_leaves_nothing(tmp_path, quantize, scheme_of, monkeypatch, where):
    model = quantize(conv_net(), scheme_of("", ["Conv2d"], num_bits=4, strategy="channel"))
    quantize(model, scheme_of("W8A8"))
    marker = {"model": "model.safetensors", "own": "lightning_compress.json", "config": "config.json"}[where]
    save_file, write_text, opener = tensors_module.save_file, Path.write_text, builtins.open

    def full_after_some_bytes(path):
        if Path(path).name == marker:
            with opener(path, "wb") as file:
                file.write(b"half")
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensors_module, "save_file", lambda t, f, **k: full_after_some_bytes(f) or save_file(t, f, **k))
    monkeypatch.setattr(Path, "write_text", lambda p, *a, **k: full_after_some_bytes(p) or write_text(p, *a, **k))
    message = r"nothing of it is left.*No space left on device.*is the disk full"
    with pytest.warns(UserWarning, match="does not shrink"), pytest.raises(OSError, match=message):
        save(model, tmp_path / "a" / "out")
    assert os.listdir(tmp_path) == []


LIMITED = """
import resource, sys, torch
from torch import nn
from compressed_tensors.quantization import preset_name_to_scheme
from lightning_compress.export.save import save
from lightning_compress.quant.record import Quantized
model = {model}
for module in [m for m in model.modules() if isinstance(m, nn.Linear)]:
    scale = torch.full((len(module.weight), 1), 0.01)
    module.weight.data = (module.weight.data / scale).round().clamp(-128, 127) * scale
    Quantized(preset_name_to_scheme("W8A8", ["Linear"]), scale).attach(module)
save(model, sys.argv[1], overwrite=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
for target in sys.argv[1:]:
    try:
        save(model, target, overwrite=True)
    except OSError as error:
        print("OSError:", error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no resource limits")
def test_a_file_that_cannot_grow_leaves_nothing_and_keeps_the_old(tmp_path):
    code = LIMITED.format(model="nn.Sequential(nn.Linear(256, 256))")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "old"), str(tmp_path / "new")],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("nothing of it is left") == 2
    assert os.listdir(tmp_path) == ["old"]
    names = ["README.md", "config.json", "export_manifest.json", "model.safetensors"]
    assert sorted(os.listdir(tmp_path / "old")) == names
    load(tmp_path / "old", nn.Sequential(nn.Linear(256, 256)), packed=False)


# -- nothing quantized ------------------------------------------------------------------------------------------------


def test_a_model_that_was_only_pruned_keeps_its_zeros(tmp_path, small_net):
    dense = copy.deepcopy(small_net)
    small_net[0].weight.data[:, ::2] = 0
    save(small_net, tmp_path / "out", recipe={"prune": {"sparsity": 0.5}})
    names = ["README.md", "config.json", "export_manifest.json", "model.safetensors", "recipe.yaml"]
    assert sorted(os.listdir(tmp_path / "out")) == names
    assert_close(load(tmp_path / "out", dense, packed=False).state_dict(), small_net.state_dict(), rtol=0, atol=0)
