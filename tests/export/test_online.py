"""Rotations beside modules in the files of an export: config.json is sealed and unsealed, entries are checked."""

import json

import pytest
from torch import nn

from lightning_compress.export.online import online_entries, read_online, seal, unsealed
from lightning_compress.modifiers.rotation.online import OnlineRotation, OnlineRotations


@pytest.mark.parametrize("quantized", [False, True])
def test_a_sealed_config_comes_back_and_names_no_class_of_transformers(tmp_path, quantized):
    config = {"architectures": ["LlamaForCausalLM"], "hidden_size": 8}
    if quantized:
        groups = {"quant_method": "compressed-tensors", "config_groups": {"g": {}}, "quantization_status": "compressed"}
        config["quantization_config"] = groups
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    seal(tmp_path)
    sealed = json.loads(path.read_text())
    assert sealed["architectures"] == ["LlamaForCausalLMWithOnlineRotations"]
    assert sealed["quantization_config"]["quantization_status"] == "online rotations: lightning_compress.load"
    assert unsealed(sealed) == config


def test_entries_come_back_as_records_and_misfits_are_named(tmp_path):
    model = nn.Sequential(nn.Linear(4, 6))
    record = OnlineRotations((OnlineRotation("input", (1, -1, 1, 1)), OnlineRotation("output", (1, -1))))
    record.attach(model[0])
    entries = json.loads(json.dumps(online_entries(model)))
    assert read_online(model, entries, tmp_path / "own.json") == {"0": record}
    with pytest.raises(ValueError, match=r"own.json, online.0: "):
        read_online(nn.Sequential(nn.Linear(6, 6)), entries, tmp_path / "own.json")
