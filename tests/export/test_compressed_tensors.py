"""What save writes and load reads, for any module; and that a failure leaves nothing half-written."""

import builtins
import copy
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

import lightning_compress.export.tensors as tensors_module
from lightning_compress.export.compressed_tensors import load, save
from lightning_compress.quant.record import Quantized

ROOT = Path(__file__).parents[2]


def conv_net():
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.BatchNorm2d(8)]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(128, 16)).eval()


def all_files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def assert_same_records(model, other):
    assert Quantized.find(model).keys() == Quantized.find(other).keys() != set()
    for name, (_, record) in Quantized.find(model).items():
        again = Quantized.of(other.get_submodule(name))
        for key in ("weights", "input_activations", "output_activations"):
            assert getattr(record.scheme, key) == getattr(again.scheme, key)
        for key in ("scale", "zero_point", "input_scale"):
            mine, its = getattr(record, key), getattr(again, key)
            assert (mine is None) == (its is None)
            assert mine is None or (torch.equal(mine, its) and mine.dtype == its.dtype)


@pytest.mark.parametrize("name", ["W8A8", "static", "W3"])
def test_any_module_comes_back_exactly(tmp_path, small_net, quantize, scheme_of, name):
    scheme = scheme_of("", num_bits=3, group_size=32, symmetric=False) if name == "W3" else scheme_of(name)
    dense = copy.deepcopy(small_net)
    quantize(small_net, scheme)
    x = torch.randn(5, 64)
    save(small_net, tmp_path / "out")
    for p in dense.parameters():
        p.data.normal_()
    again = load(tmp_path / "out", dense, packed=False)
    assert again is dense
    assert_close(again(x), small_net(x), rtol=0, atol=0)
    assert_close(again.state_dict(), small_net.state_dict(), rtol=0, atol=0)
    assert_same_records(small_net, again)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.keys() == {"quantization_config"}
    assert config["quantization_config"]["quantization_status"] == "compressed"


def test_the_live_model_does_not_change(tmp_path, small_net, quantize, scheme_of):
    quantize(small_net, scheme_of("W8A8"))
    before = copy.deepcopy(small_net.state_dict())
    attributes = {name: sorted(vars(module)) for name, module in small_net.named_modules()}
    schemes = {name: copy.deepcopy(record.scheme) for name, (_, record) in Quantized.find(small_net).items()}
    save(small_net, tmp_path / "out")
    assert_close(small_net.state_dict(), before, rtol=0, atol=0)
    assert attributes == {name: sorted(vars(module)) for name, module in small_net.named_modules()}
    assert schemes == {name: record.scheme for name, (_, record) in Quantized.find(small_net).items()}


def test_a_hugging_face_config_does_not_change(tmp_path, tiny_llama, quantize, scheme_of):
    model = quantize(tiny_llama(), scheme_of("W4A16"))
    before = copy.deepcopy(model.config.to_dict())
    save(model, tmp_path / "out")
    assert model.config.to_dict() == before


def test_modules_that_no_loader_reads_packed_stay_dense_and_are_named(tmp_path, quantize, scheme_of):
    model = conv_net()
    quantize(model, scheme_of("", ["Conv2d"], num_bits=4, strategy="channel", symmetric=False))
    quantize(model, scheme_of("W8A8"))
    with pytest.warns(UserWarning, match=r"2 of 3 .* does not shrink: 0 \(no loader reads a packed Conv2d\); 2 \("):
        save(model, tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert weights["0.weight"].dtype == torch.float32
    assert weights["5.weight"].dtype == torch.int8
    own = json.loads((tmp_path / "out" / "lightning_compress.json").read_text())
    assert sorted(own["dense"]) == ["0", "2"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert [group["targets"] for group in config["config_groups"].values()] == [["Linear"]]
    x = torch.randn(2, 3, 8, 8)
    again = load(tmp_path / "out", conv_net(), packed=False)
    assert_close(again(x), model(x), rtol=0, atol=0)
    assert_same_records(model, again)


def test_quantized_inputs_that_plain_loaders_will_skip_are_named(tmp_path, quantize, scheme_of):
    model = quantize(conv_net(), scheme_of("W8A8", ["Conv2d"]))
    with pytest.warns(UserWarning, match="will not quantize the inputs of 0, 2"):
        save(model, tmp_path / "out")
    x = torch.randn(2, 3, 8, 8)
    assert_close(load(tmp_path / "out", conv_net(), packed=False)(x), model(x), rtol=0, atol=0)


def test_subclasses_and_unquantized_modules_are_ignored_by_name(tmp_path, quantize, scheme_of):
    class Router(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(32, 32), Router(32, 32), nn.Linear(32, 32), nn.Embedding(4, 4)).eval()
    quantize(model, scheme_of("", num_bits=4, group_size=32), ["1", "2"])
    save(model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert sorted(config["ignore"]) == ["1", "2"]


def test_an_embedding_may_be_packed(tmp_path, scheme_of):
    from lightning_compress.quant.fake_quant import round_weight
    from lightning_compress.quant.scales import minmax

    model, scheme = nn.Sequential(nn.Embedding(10, 32)).eval(), scheme_of("", ["Embedding"], num_bits=4, group_size=32)
    scale, _ = minmax(model[0].weight.data, scheme.weights)
    model[0].weight.data = round_weight(model[0].weight.data, scale, None, scheme.weights)
    Quantized(scheme, scale).attach(model[0])
    save(model, tmp_path / "out")
    again = load(tmp_path / "out", nn.Sequential(nn.Embedding(10, 32)), packed=False)
    assert torch.equal(again[0].weight, model[0].weight)


def test_shared_modules_and_parameters_are_written_once(tmp_path, quantize, scheme_of):
    def build():
        shared = nn.Linear(32, 32)
        model = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(32, 32), nn.Linear(32, 32))
        model[4].weight = model[3].weight
        return model

    model = quantize(build(), scheme_of("", num_bits=4, group_size=32), ["3", "4"])
    save(model, tmp_path / "out")
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert {n.split(".")[0] for n in names if "weight" in n} == {"0", "3"}
    x = torch.randn(4, 32)
    assert_close(load(tmp_path / "out", build(), packed=False)(x), model(x), rtol=0, atol=0)


def test_a_compiled_model_has_plain_names(tmp_path, small_net, quantize, scheme_of):
    quantize(small_net, scheme_of("W8A8"), ["4"])
    save(small_net, tmp_path / "plain")
    save(torch.compile(small_net), tmp_path / "whole")
    for place in (0, 4):
        small_net[place] = nn.Sequential(small_net[place])
    save(small_net, tmp_path / "nested")
    for place in (0, 4):
        small_net[place] = torch.compile(small_net[place])
    save(small_net, tmp_path / "compiled")
    assert all_files(tmp_path / "plain") == all_files(tmp_path / "whole")
    assert all_files(tmp_path / "nested") == all_files(tmp_path / "compiled")


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
    names = ["config.json", "export_manifest.json", "model.safetensors", "recipe.yaml", "tokenizer.json"]
    assert sorted(os.listdir(tmp_path / "out")) == names
    read = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert (read, list(read)) == (recipe, ["b", "a"])


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_named(tmp_path, small_net, quantize, scheme_of, value):
    quantize(small_net, scheme_of("W8A8"))
    small_net[3].weight.data[1] = value
    with pytest.raises(ValueError, match=r"NaN or Inf in 1 parameters or buffers, such as 3.weight"):
        save(small_net, tmp_path / "out")
    model = quantize(conv_net(), scheme_of("W8A8"))
    model[3].running_mean[3] = value
    with pytest.raises(ValueError, match=r"NaN or Inf in 1 parameters or buffers, such as 3.running_mean"):
        save(model, tmp_path / "out")
    assert os.listdir(tmp_path) == []


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


def test_adapters_and_weights_that_are_elsewhere(tmp_path, tiny_llama, small_net, quantize, scheme_of):
    quantize(small_net, scheme_of("W8A8"))[3].to("meta")
    with pytest.raises(ValueError, match=r"2 weights are not in memory, such as 3.weight; load the model without"):
        save(small_net, tmp_path / "out")
    llama = quantize(tiny_llama(), scheme_of("W4A16"))
    llama._hf_peft_config_loaded = True
    with pytest.raises(ValueError, match="carries PEFT adapters; merge them"):
        save(llama, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_a_model_of_several_parts(tmp_path, quantize, scheme_of):
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision, text = {"image_size": 32, "patch_size": 16}, {"vocab_size": 64, "eos_token_id": 2, "bos_token_id": 1}
    model = quantize(CLIPModel(CLIPConfig(text_config=sizes | text, vision_config=sizes | vision)), scheme_of("W4A16"))
    save(model, tmp_path / "out")
    assert_same_records(model, load(tmp_path / "out", packed=False))


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
from lightning_compress.export.compressed_tensors import save
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
    assert sorted(os.listdir(tmp_path / "old")) == ["config.json", "export_manifest.json", "model.safetensors"]
    load(tmp_path / "old", nn.Sequential(nn.Linear(256, 256)), packed=False)


# -- loading what does not fit ----------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path, small_net, quantize, scheme_of):
    return save(quantize(small_net, scheme_of("W8A8")), tmp_path / "out")


def test_load_needs_the_model_when_it_is_not_hugging_faces(saved):
    with pytest.raises(ValueError, match=r"no Hugging Face model; build the dense model and call load\(folder, m"):
        load(saved, packed=False)


def test_load_of_a_folder_that_is_none(tmp_path):
    with pytest.raises(ValueError, match=r"has no config.json; is it a folder that save wrote"):
        load(tmp_path, packed=False)


def test_load_of_a_model_that_another_method_quantized(tmp_path, tiny_llama):
    tiny_llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ValueError, match=r"was quantized by gptq, expected compressed-tensors; load it with transform"):
        load(tmp_path, packed=False)


def test_load_without_the_weights(saved, small_net):
    (saved / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no model.safetensors; is it a folder that save wrote, and copied whole"):
        load(saved, small_net, packed=False)


def test_load_into_another_model(saved, small_net):
    with pytest.raises(ValueError, match=r"the model lacks \['3.bias'.*the folder lacks \[\]; build the model as"):
        load(saved, nn.Sequential(*small_net[:3]), packed=False)
    with pytest.raises(ValueError, match=r"'5' is quantized, but the files in .* lack its weight"):
        load(saved, nn.Sequential(*small_net, nn.Linear(8, 8)), packed=False)
    with pytest.raises(ValueError, match=r"torch.float32 .* in /.*out, torch.bfloat16 .* in the model; build it"):
        load(saved, copy.deepcopy(small_net).to(torch.bfloat16), packed=False)
    with pytest.raises(ValueError, match="not on meta"):
        load(saved, copy.deepcopy(small_net).to("meta"), packed=False)


def test_load_of_a_newer_format(saved, small_net):
    (saved / "lightning_compress.json").write_text('{"format_version": 2}')
    with pytest.raises(ValueError, match="has format_version 2, expected 1"):
        load(saved, small_net, packed=False)


def rewrite(folder, **changed):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: change(tensors[name]) for name, change in changed.items()}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("3.bias", lambda t: t * torch.nan, "NaN or Inf in 1 parameters or buffers, such as 3.bias"),
        ("3.running_var", lambda t: t - torch.inf, "NaN or Inf in 1 parameters or buffers, such as 3.running_var"),
        ("0.weight_scale", lambda t: -t, "model.safetensors, '0': '0': its scale is not finite and positive"),
        ("0.weight_scale", lambda t: t * torch.nan, "model.safetensors, '0': '0': its scale is not finite"),
        ("0.weight_scale", lambda t: t[1:].clone(), "model.safetensors, '0': "),
        ("0.weight", lambda t: t[1:].clone(), r"'0': its weight is \[31, 64\] in the file, and in the model"),
    ],
    ids=["NaN bias", "Inf variance", "negative scale", "NaN scale", "too few scales", "too few rows"],
)
def test_load_of_numbers_that_cannot_be(saved, small_net, name, change, message):
    """The model that was given stays as it is."""
    rewrite(saved, **{name: change})
    before = copy.deepcopy(small_net.state_dict())
    with pytest.raises(ValueError, match=rf"{saved}.*{message}"):
        load(saved, small_net, packed=False)
    assert_close(small_net.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_hidden_layers": 10**12}, r"num_hidden_layers is 1000000000000, and the files beside it hold \d+ te"),
        ({"num_labels": 10**9}, "num_labels is 1000000000, and the files"),
        ({"vocab_size": 10**12}, r"describes a model of [\d,]{15,} weights and .* hold [\d,]+; copy"),
        ({"num_hidden_layers": "two"}, "config.json: "),
        ({"hidden_act": "nothing"}, "config.json: KeyError: 'nothing'"),
        ({"architectures": ["OPTForCausalLM"]}, "'llama' does not belong to the architecture 'OPTForCausalLM'"),
        ({"quantization_config": []}, r"config.json: quantization_config must be an object, got \[\]"),
        ({"quantization_config": {"config_groups": 3}}, "config.json, quantization_config: "),
    ],
    ids=["layers", "labels", "vocabulary", "a word", "activation", "architecture", "a list", "groups"],
)
def test_load_of_a_config_that_does_not_fit(tmp_path, tiny_llama, quantize, scheme_of, settings, message):
    save(quantize(tiny_llama(), scheme_of("W4A16"), ["lm_head"]), tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(ValueError, match=rf"{path.parent}.*{message}"):
        load(path.parent)


def test_load_into_a_hugging_face_model_that_is_there(tmp_path, tiny_llama, quantize, scheme_of):
    model = quantize(tiny_llama(), scheme_of("W4A16"), ["lm_head"])
    save(model, tmp_path / "out")
    fresh = tiny_llama()
    for p in fresh.parameters():
        p.data.zero_()
    assert load(tmp_path / "out", fresh, packed=False) is fresh
    assert_close(fresh.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert_same_records(model, fresh)
    on_cpu = load(tmp_path / "out", device="cpu", packed=False)
    assert all(record.scale.device.type == "cpu" for _, record in Quantized.find(on_cpu).values())


@pytest.mark.parametrize("name", ["pipeline", "Trainer", "LlamaConfig", "MyOwnModel"])
def test_only_a_model_of_transformers_is_built(tmp_path, tiny_llama, quantize, scheme_of, name):
    save(quantize(tiny_llama(), scheme_of("W4A16")), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps(config | {"architectures": [name]}))
    with pytest.raises(ValueError, match=rf"transformers has no model '{name}'.*build the dense model and call load"):
        load(tmp_path / "out", packed=False)


def test_load_in_bfloat16(tmp_path, tiny_llama, quantize, scheme_of):
    model = quantize(tiny_llama(torch.bfloat16), scheme_of("", num_bits=8, group_size=64, symmetric=False))
    save(model, tmp_path / "out")
    again = load(tmp_path / "out", packed=False)
    assert again.dtype == torch.bfloat16
    assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert_same_records(model, again)


def test_a_detached_model_is_dense_again(saved, small_net):
    for module, _ in Quantized.find(small_net).values():
        Quantized.detach(module)
    folder = save(small_net, saved.parent / "dense")
    assert (folder / "config.json").read_text() == "{}\n"
    assert_close(load_file(folder / "model.safetensors"), dict(small_net.state_dict()), rtol=0, atol=0)


# -- nothing quantized ------------------------------------------------------------------------------------------------


def test_a_model_that_was_only_pruned_keeps_its_zeros(tmp_path, small_net):
    dense = copy.deepcopy(small_net)
    small_net[0].weight.data[:, ::2] = 0
    save(small_net, tmp_path / "out", recipe={"prune": {"sparsity": 0.5}})
    names = ["config.json", "export_manifest.json", "model.safetensors", "recipe.yaml"]
    assert sorted(os.listdir(tmp_path / "out")) == names
    assert_close(load(tmp_path / "out", dense, packed=False).state_dict(), small_net.state_dict(), rtol=0, atol=0)


def test_sizes_that_the_config_does_not_promise_are_named(tmp_path, tiny_llama):
    model = tiny_llama()
    mlp = model.model.layers[0].mlp
    mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight[:, :96])
    mlp.gate_proj.weight = nn.Parameter(mlp.gate_proj.weight[:96])
    mlp.up_proj.weight = nn.Parameter(mlp.up_proj.weight[:96])
    with pytest.warns(UserWarning, match=r"3 weights do not have the sizes.*gate_proj.weight \(96, 128\), by th"):
        save(model, tmp_path / "out")


def test_tied_weights_as_a_list_are_refused_by_save(tmp_path, tiny_llama):
    model = tiny_llama(tie_word_embeddings=True)
    model._tied_weights_keys = ["lm_head.weight"]
    with pytest.raises(ValueError, match=r"LlamaForCausalLM\._tied_weights_keys is a list, and transformers 5 saves"):
        save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_the_class_never_loads_are_named(tmp_path, tiny_llama):
    """Layers that predict more tokens (MTP) lie beside many models; from_pretrained passes over them."""
    from transformers import AutoModelForCausalLM

    from lightning_compress import QuantizationModifier, compress

    source = tmp_path / "source"
    tiny_llama().save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    extra = {"mtp.layers.0.weight": torch.ones(2), "mtp.layers.0.inv_freq": torch.ones(2)}
    save_file(tensors | extra, source / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(source)
    model._keys_to_ignore_on_load_unexpected = ["mtp.*"]
    compress(model, QuantizationModifier(scheme="W8A16", group_size=-1, ignore=["lm_head"]))
    with pytest.warns(UserWarning, match=r"holds 1 tensors that LlamaForCausalLM does not load, such as mtp.layers.0"):
        save(model, tmp_path / "out")


def test_what_was_added_to_a_model_comes_back_in_one_that_has_it_too(tmp_path, tiny_llama, quantize, scheme_of):
    def build(value):
        model = tiny_llama()
        model.register_buffer("steps", torch.full((3,), value))
        model.reward = nn.Linear(128, 64)
        return model

    model = quantize(build(2.0), scheme_of("W4A16"), ["re:.*lm_head"])
    with pytest.warns(UserWarning, match=r"and pass over what .*: reward.bias, reward.weight, steps \(3 tensors\)"):
        save(model, tmp_path / "out")
    again = load(tmp_path / "out", build(0.0), packed=False)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert Quantized.find(again).keys() == Quantized.find(model).keys() >= {"reward"}
    with pytest.raises(ValueError, match=r"'reward.weight_packed', .*where something was added to the model"):
        load(tmp_path / "out")


def test_weights_that_the_class_would_initialize_anew_are_named(tmp_path, tiny_llama):
    model = tiny_llama()
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 2
    with pytest.warns(UserWarning, match=r"and initialize anew what this LlamaForCausalLM lacks: model.*1\."):
        save(model, tmp_path / "out")
    model.config.num_hidden_layers = 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(model, tmp_path / "right")


def test_a_model_from_no_folder_is_not_held_against_the_current_one(tmp_path, tiny_llama, monkeypatch, recwarn):
    from lightning_compress.export.hugging_face import warn_of_dropped

    save_file({"mtp.layers.0.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    model = tiny_llama()
    model._keys_to_ignore_on_load_unexpected = ["mtp.*"]
    assert model.config._name_or_path == ""
    warn_of_dropped(model)
    assert not recwarn.list
