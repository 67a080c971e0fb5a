"""Our folders against what llm-compressor 0.14.0.1 wrote for the same model and recipe (peer_schema.json)."""

import json
from pathlib import Path

import pytest
import torch

from lightning_compress.export.save import save
from lightning_compress.modifiers.gptq.modifier import GPTQModifier
from lightning_compress.modifiers.quantization import QuantizationModifier
from lightning_compress.oneshot import compress

compare_export = pytest.importorskip("benchmarks.compare_export")  # not part of a source distribution
PEER = json.loads((Path(__file__).parent / "peer_schema.json").read_text())


@pytest.mark.parametrize("case", PEER["cases"])
def test_config_keys_and_tensors_are_those_of_the_peer(tmp_path, case):
    """Values: benchmarks/compare_export.py finds them equal after rounding to nearest."""
    from transformers import LlamaConfig, LlamaForCausalLM

    technique, scheme = compare_export.CASES[case]
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**PEER["model"])).eval()
    recipe = {"targets": ["Linear"], "ignore": ["lm_head"], "scheme": scheme}
    if technique == "rtn":
        compress(model, QuantizationModifier(**recipe))
    else:
        compress(model, GPTQModifier(**recipe), [{"input_ids": torch.arange(64)[None]}])
    ours = compare_export.schema_of(save(model, tmp_path / "out"))
    peers = PEER["cases"][case]
    assert ours["tensors"] == peers["tensors"]
    found = compare_export.differences(ours["quantization_config"], peers["quantization_config"])
    assert {key: pair for key, pair in found.items() if compare_export.explanation(key, *pair) is None} == {}
    assert "version" in found


def test_a_difference_that_matters_is_not_explained_away():
    for key, ours, peers in (
        ("config_groups.group_0.weights.group_size", 64, 128),
        ("config_groups.group_0.weights.actorder", "static", None),
        ("config_groups.group_0.weights.observer", "absent", "mse"),
        ("config_groups.group_0.weights.zp_dtype", "absent", "torch.uint8"),
        ("format", "pack-quantized", "int-quantized"),
        ("ignore", [], ["lm_head"]),
    ):
        assert compare_export.explanation(key, ours, peers) is None
