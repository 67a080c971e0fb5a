import json

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_compress import CompressionCallback, QuantizationModifier, save
from tests.support.training_runs import quiet

gguf = pytest.importorskip("gguf")
ROWS = torch.arange(64).view(8, 8)


class Decoder(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
        self.model = LlamaForCausalLM(LlamaConfig(vocab_size=96, max_position_embeddings=32, **sizes))

    def training_step(self, batch, batch_idx):
        return self.model(**batch, labels=batch["input_ids"]).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def fit(folder, module, scheme="W4A16", formats=("compressed_tensors", "gguf"), **arguments):
    modifier = QuantizationModifier(scheme=scheme, ignore=["lm_head"], **arguments)
    callback = CompressionCallback(modifier, export=[*formats], evaluate=False)
    rows = [{"input_ids": row} for row in ROWS]
    quiet(folder, callback).fit(module, DataLoader(rows, 4))


def test_a_run_writes_the_file_that_save_writes(tmp_path):
    module = Decoder()
    fit(tmp_path, module, group_size=32)
    folder = tmp_path / "compressed_gguf"
    assert {path.name for path in folder.iterdir()} == {"model.gguf", "recipe.yaml", "export_manifest.json"}
    facts = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert facts["gguf"] == {
        "file": str(folder / "model.gguf"), "bytes": (folder / "model.gguf").stat().st_size
    }  # fmt: skip
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(folder / "model.gguf").tensors}
    assert types["blk.0.attn_q.weight"] == "Q4_0"
    again = save(module.model, tmp_path / "again", format="gguf")
    assert (again / "model.gguf").read_bytes() == (folder / "model.gguf").read_bytes()


@pytest.mark.parametrize(
    ("scheme", "arguments", "message"),
    [
        ("W8A8", {}, "run with quantized inputs, which GGUF does not hold"),
        ("W4A16_ASYM", {"group_size": 32}, "no weight would be smaller in GGUF"),
        ("W4A16", {"group_size": 16}, "no weight would be smaller in GGUF"),
    ],
)
def test_what_llama_cpp_cannot_hold_is_refused_before_training(tmp_path, scheme, arguments, message):
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, Decoder(), scheme, **arguments)
    assert not (tmp_path / "compressed_gguf").exists()


def test_other_models_are_refused_before_training(tmp_path):
    module = Decoder()
    module.model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    with pytest.raises(ValueError, match="GGUF is written for LlamaForCausalLM"):
        fit(tmp_path, module, group_size=32)
