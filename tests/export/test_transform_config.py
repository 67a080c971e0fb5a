"""Rotations in config.json: as compressed-tensors writes them, read back in a clean process, refused where unread."""

import json
import os
import subprocess
import sys

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.transform import TransformArgs, TransformConfig, TransformScheme, apply_transform_config
from compressed_tensors.utils.match import is_match
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from lightning_compress import (
    BlockHadamardModifier,
    GPTQModifier,
    QuantizationModifier,
    RotationModifier,
    compress,
    load,
    save,
)
from lightning_compress.export.transform_config import transform_config, transform_tensors
from lightning_compress.modifiers.rotation import online
from lightning_compress.modifiers.rotation.online import OnlineRotations
from tests.support.rotation_models import build, logits, token_batches

pytestmark = [
    pytest.mark.filterwarnings("ignore:config.json (states|says)"),
    pytest.mark.filterwarnings("ignore:.*rotations run beside"),
]
WIDTHS = {"hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": False}
HEAD = ["re:.*lm_head"]


def turned(block=32, **settings):
    model = build("llama", **WIDTHS, **settings)
    compress(model, BlockHadamardModifier(block_size=block, transform_config=True))
    return model


def exported(folder, scheme="MXFP4A16", **options):
    model = turned()
    compress(model, GPTQModifier(scheme=scheme, ignore=HEAD), token_batches(2))
    save(model, folder, **options)
    return model


def quantization_config(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def test_compressed_tensors_turns_the_same_weights_and_writes_the_same_config_and_tensor(tmp_path):
    ours, theirs = turned(), build("llama", **WIDTHS)
    before = logits(theirs)
    config = transform_config(ours)
    apply_transform_config(theirs, TransformConfig.model_validate(config.model_dump()))
    assert (logits(theirs) - before).abs().max() < 1e-5 * before.abs().max()  # its config is right by its own code
    for name, weight in ours.state_dict().items():
        assert_close(weight, theirs.state_dict()[name], rtol=0, atol=1e-6)
    assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)
    (tmp_path / "config.json").write_text("{}")
    ModelCompressor(transform_config=theirs.transform_config).update_config(str(tmp_path))
    written = quantization_config(tmp_path)["transform_config"]
    compress(ours, QuantizationModifier(scheme="MXFP4A16", ignore=HEAD))
    save(ours, tmp_path / "ours")
    assert quantization_config(tmp_path / "ours")["transform_config"] == written
    ((name, matrix),) = transform_tensors(ours).items()
    assert torch.equal(load_file(tmp_path / "ours" / "model.safetensors")[name], matrix)
    assert torch.equal(theirs.state_dict()[name], matrix)  # shared by all of its modules
    assert name == "model.layers.0.self_attn.q_proj.hadamard_32_input.weight"


def test_the_config_selects_the_turned_linears_and_no_other():
    model = build("llama", **WIDTHS)
    compress(model, BlockHadamardModifier(block_size=16, transform_config=True, ignore=[*HEAD, "re:.*o_proj"]))
    compress(model, BlockHadamardModifier(block_size=32, transform_config=True, targets="re:.*o_proj", ignore=[]))
    schemes = transform_config(model).config_groups
    assert {name: scheme.head_dim for name, scheme in schemes.items()} == {"hadamard_16": 16, "hadamard_32": 32}
    for scheme in schemes.values():
        assert [args.location for args in scheme.apply] == ["input", "weight_input"]
        for args in scheme.apply:
            selected = {n for n, m in model.named_modules() if is_match(n, m, args.targets, args.ignore)}
            orders = {n: len(record.rotations[0].signs) for n, (_, record) in OnlineRotations.find(model).items()}
            assert selected == {name for name, order in orders.items() if order == scheme.head_dim}


def test_a_clean_process_loads_the_outputs_of_the_model(tmp_path):
    model = exported(tmp_path / "out", "NVFP4", recipe={"modifiers": [{"BlockHadamardModifier": {"block_size": 32}}]})
    program = (
        "import sys, torch, lightning_compress\n"
        "from tests.support.rotation_models import logits\n"
        "from safetensors.torch import save_file\n"
        "model = lightning_compress.load(sys.argv[1])\n"
        "save_file({'logits': logits(model)}, sys.argv[2])\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "out"), str(tmp_path / "logits")]
    process = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    assert torch.equal(load_file(tmp_path / "logits")["logits"], logits(model))
    again = load(tmp_path / "out")
    save(again, tmp_path / "twice", recipe={"modifiers": [{"BlockHadamardModifier": {"block_size": 32}}]})
    assert all((tmp_path / "twice" / f.name).read_bytes() == f.read_bytes() for f in (tmp_path / "out").iterdir())
    with pytest.raises(ValueError, match="rotations run beside its modules, which packed modules cannot have"):
        load(tmp_path / "out", packed=True)
    with pytest.raises(ValueError, match="save_pretrained would lose .*rotations that run beside modules"):
        again.save_pretrained(tmp_path / "no")


@pytest.mark.filterwarnings("default:config.json states")
def test_the_folder_and_a_warning_say_who_applies_it(tmp_path):
    with pytest.warns(UserWarning, match="the inputs of 14 modules as transform_config: vLLM and .*something else"):
        exported(tmp_path / "out")
    note = (tmp_path / "out" / "README.md").read_text()
    assert "inputs of 14 Linears, such as model.layers.0.self_attn.q_proj" in note
    assert "transformers does not" in note
    manifest = json.loads((tmp_path / "out" / "export_manifest.json").read_text())
    assert "README.md" in manifest["files"]


def test_without_the_option_nothing_is_in_the_config_and_the_folder_is_sealed(tmp_path, monkeypatch):
    model = build("llama", **WIDTHS)
    compress(model, [BlockHadamardModifier(), QuantizationModifier(scheme="MXFP4A16", ignore=HEAD)])
    save(model, tmp_path / "out")
    assert quantization_config(tmp_path / "out")["transform_config"] == {}
    assert "Inputs are rotated" not in (tmp_path / "out" / "README.md").read_text()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMWithOnlineRotations"]
    again, inputs = load(tmp_path / "out"), []
    assert torch.equal(logits(again), logits(model))
    transform = online.fast_hadamard_transform
    monkeypatch.setattr(
        online, "fast_hadamard_transform", lambda x, **more: (inputs.append(x), transform(x, **more))[1]
    )
    logits(again)
    assert len(inputs) == 8  # of each of two blocks: q k v, o, gate up, down


def test_exports_that_no_loader_would_apply_are_refused(tmp_path):
    with pytest.raises(ValueError, match="verify=True lets plain transformers load .*leave verify out"):
        exported(tmp_path / "out", verify=True)
    with pytest.raises(ValueError, match="but nothing is quantized, .*set transform_config=False"):
        save(turned(), tmp_path / "out")
    plain = nn.Sequential(nn.Linear(32, 32))
    compress(plain, [BlockHadamardModifier(transform_config=True), QuantizationModifier(scheme="MXFP4A16")])
    with pytest.raises(
        ValueError, match="vLLM, which reads it, loads models of transformers, and this is a Sequential"
    ):
        save(plain, tmp_path / "out")
    mixed = build("llama", **WIDTHS)
    compress(mixed, RotationModifier(rotations=["R4"], allow_online=True))
    compress(mixed, BlockHadamardModifier(transform_config=True, ignore=[*HEAD, "re:.*down_proj"]))
    compress(mixed, QuantizationModifier(scheme="MXFP4A16", ignore=HEAD))
    with pytest.raises(
        ValueError, match=r"'model.layers.0.mlp.down_proj' has a rotation that config.json cannot state"
    ):
        save(mixed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("default:vLLM refuses")
def test_linears_with_a_bias_are_named_for_vllm(tmp_path):
    model = build("qwen2", **WIDTHS)
    recipe = [BlockHadamardModifier(transform_config=True), QuantizationModifier(scheme="MXFP4A16", ignore=HEAD)]
    compress(model, recipe)
    with pytest.warns(UserWarning, match=r"vLLM refuses .* with a bias, such as model.layers.0.self_attn.q_proj, "):
        save(model, tmp_path / "out")


# -- folders of others ------------------------------------------------------------------------------------------------


def theirs(folder, scheme):
    """A folder whose transforms compressed-tensors applied, its weights on the grid."""
    model = build("llama", **WIDTHS)
    config = TransformConfig(config_groups={"v": scheme})
    apply_transform_config(model, config)
    expected = logits(model)
    dense = build("llama", **WIDTHS)
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            parameter.copy_(model.get_parameter(name))
    compress(dense, QuantizationModifier(scheme="W8A16", group_size=-1, ignore=HEAD))
    save(dense, folder)
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"]["transform_config"] = json.loads(config.model_dump_json())
    (folder / "config.json").write_text(json.dumps(content))
    matrices = {n: t for n, t in model.state_dict().items() if n.startswith("model.layers.0.self_attn.q_proj.v_")}
    tensors = load_file(folder / "model.safetensors") | {name: tensor.clone() for name, tensor in matrices.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return expected, matrices, tensors


def applied(location, **options):
    ignore = HEAD
    return [
        TransformArgs(targets=["Linear"], location=location, ignore=ignore, **options),
        TransformArgs(targets=["Linear"], location=f"weight_{location}", ignore=ignore, inverse=True, **options),
    ]


@pytest.mark.parametrize("location", ["input", "output"])
@pytest.mark.parametrize("order", [16, 32])
def test_transforms_of_others_run_online(tmp_path, location, order):
    apply = applied(location)
    if location == "output":
        apply = [args.model_copy(update={"inverse": not args.inverse}) for args in apply]
    expected, matrices, _ = theirs(tmp_path / "out", TransformScheme(type="hadamard", apply=apply, head_dim=order))
    assert len(matrices) == 1
    again = load(tmp_path / "out")
    assert (logits(again) - expected).norm() < 0.02 * expected.norm()  # of 8-bit weights
    save(again, tmp_path / "twice")
    assert torch.equal(logits(load(tmp_path / "twice")), logits(again))


def test_transforms_that_are_not_known_are_refused(tmp_path):
    scheme = TransformScheme(type="hadamard", apply=applied("input"), head_dim=32)
    _, matrices, tensors = theirs(tmp_path / "out", scheme)
    (name,) = matrices
    save_file(tensors | {name: -tensors[name]}, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"v_input.weight \(32, 32\) is not Sylvester's Hadamard matrix"):
        load(tmp_path / "out")
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    group = content["quantization_config"]["transform_config"]["config_groups"]["v"]
    for change, message in (
        ({"type": "random-hadamard"}, "v: type 'random-hadamard', randomize=False, expected 'hadamard'"),
        ({"head_dim": 24}, "v: head_dim 24 is not a power of two that divides the 64 of"),
        ({"apply": [group["apply"][0] | {"location": "q_attn"}]}, "v: location 'q_attn', expected 'input' or 'output'"),
        ({"apply": [group["apply"][0]] * 2}, "v: the input of 'model.layers.0.self_attn.q_proj' is turned twice"),
        ({"speed": 1}, "Extra inputs are not permitted"),
    ):
        content["quantization_config"]["transform_config"]["config_groups"]["v"] = group | change
        (tmp_path / "out" / "config.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=f"config.json, transform_config: .*{message}"):
            load(tmp_path / "out")
