"""Rotated and quantized, exported, and loaded by plain transformers in a process without this package: same logits."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from lightning_compress import GPTQModifier, RotationModifier, compress, load, save
from tests.support.rotation_models import build, token_batches

READER = """
import json, sys, torch, transformers
from safetensors.torch import load_file, save_file
root, logits = sys.argv[1], {}
for name in json.load(open(f"{root}/cases.json")):
    model = transformers.AutoModelForCausalLM.from_pretrained(f"{root}/{name}").eval()
    with torch.no_grad():
        logits[name] = model(**load_file(f"{root}/batch")).logits.contiguous()
assert not [m for m in sys.modules if m.startswith("lightning")], "the reader must not know this package"
save_file(logits, f"{root}/read")
"""
W4 = {"scheme": "W4A16", "group_size": -1}
CASES = {
    "llama_tied_w4": ("llama", {"tie_word_embeddings": True}, W4),
    "llama_w4a4": ("llama", {"tie_word_embeddings": False}, {"scheme": "W4A4", "group_size": -1}),
    "qwen2_tied_w4": ("qwen2", {"tie_word_embeddings": True}, W4),
    "qwen3_w4": ("qwen3", {}, W4),
    "opt_tied_w4": ("opt", {}, W4),
    "gpt2_tied_w4": ("gpt2", {}, {**W4, "targets": ["Conv1D"]}),
}


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory):
    """(root, logits in memory, logits of the reader)."""
    root = tmp_path_factory.mktemp("rotated")
    batch, logits = {"input_ids": torch.arange(24).reshape(2, 12)}, {}
    for name, (kind, settings, scheme) in CASES.items():
        model = build(kind, **settings)
        compress(model, [RotationModifier(), GPTQModifier(ignore=["re:.*lm_head"], **scheme)], token_batches(3))
        with torch.no_grad():
            logits[name] = model(**batch).logits
        save(model, root / name)
    save_file(batch, root / "batch")
    (root / "cases.json").write_text(json.dumps(list(CASES)))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [sys.executable, "-c", READER, str(root)], cwd=root, env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return root, logits, load_file(root / "read")


pytestmark = [
    pytest.mark.filterwarnings("ignore:.*shared its weight with the embeddings"),
    pytest.mark.filterwarnings("ignore:.*written with dense weights"),
]


@pytest.mark.parametrize("case", CASES)
def test_plain_transformers_gives_the_logits_of_the_model_in_memory(reloaded, case):
    _, in_memory, read = reloaded
    assert in_memory[case].std() > 0.01
    assert_close(read[case], in_memory[case], rtol=0, atol=1e-4 * in_memory[case].abs().max().item())


@pytest.mark.parametrize("case", CASES)
def test_load_gives_them_too(reloaded, case):
    root, in_memory, _ = reloaded
    with torch.no_grad():
        again = load(root / case)(**load_file(root / "batch")).logits
    assert_close(again, in_memory[case], rtol=0, atol=0)


def test_the_config_of_a_tied_model_says_untied(reloaded):
    root, _, _ = reloaded
    assert json.loads((root / "llama_tied_w4" / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in load_file(root / "llama_tied_w4" / "model.safetensors")
