"""Every recipe of the package runs as it is on four usual models, or refuses one for a reason that stands here."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from lightning_compress import AutoRoundModifier, CompressionCallback, QuantizationModifier, compress, save
from lightning_compress.recipe import load_recipe
from tests.support.training_runs import quiet

RECIPES = sorted(p.stem for p in (Path(__file__).parents[1] / "conf" / "compress").glob("*.yaml"))


def mlp() -> nn.Module:
    """The default model of lightning-hydra-template: none of its widths is a multiple of all usual group sizes."""
    widths = (784, 64, 128, 64)
    hidden = [m for i, o in pairwise(widths) for m in (nn.Linear(i, o), nn.BatchNorm1d(o), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(64, 10))


def cnn() -> nn.Module:
    convolutions = [m for i, o in ((3, 32), (32, 64)) for m in (nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.ReLU())]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(64 * 4 * 4, 48), nn.ReLU(), nn.Linear(48, 10))


def vit() -> nn.Module:
    sizes = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 200}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=10))


def llama() -> nn.Module:
    """The width of SmolLM2-135M, 576, beside one that 128 divides."""
    sizes = {"hidden_size": 576, "intermediate_size": 256, "num_attention_heads": 9, "num_key_value_heads": 3}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=128, num_hidden_layers=2, tie_word_embeddings=True))


MODELS = {
    "mlp": (mlp, lambda: torch.randn(8, 784)),
    "cnn": (cnn, lambda: torch.randn(8, 3, 16, 16)),
    "vit": (vit, lambda: {"pixel_values": torch.randn(2, 3, 16, 16)}),
    "llama": (llama, lambda: {"input_ids": torch.randint(128, (1, 16))}),
}

NO_BLOCKS = "cannot tell which list of blocks is meant, found none"
NO_CACHE = "has no attention module whose keys and values can be quantized"
NO_EXPERTS = "has no experts in one tensor"
NO_TOKENS = "has no nn.Embedding, so that its residual stream does not begin with token ids"
NO_ATTENTION = "matches none of the model's 10 modules"
ODD_BLOCKS = "block_size=32 does not divide the .* input features"
ODD_COLUMNS = "group_size=(16|32) does not divide .* the format knows no other size"
ODD_GROUPS = "group_size=32 does not divide the input columns of"

REFUSED = {
    "mlp": {
        "gptq_q4_0": ODD_GROUPS, "rtn_q8_0": ODD_GROUPS,
        "depth_1": NO_BLOCKS, "kv_fp8": NO_CACHE, "mixed_w8a8_w4": NO_ATTENTION, "reap_25": NO_EXPERTS,
        "rotate": NO_TOKENS, "gptq_mxfp4_hadamard": ODD_BLOCKS, "qat_mxfp4": ODD_COLUMNS,
    },
    "cnn": {
        "gptq_q4_0": ODD_GROUPS, "rtn_q8_0": ODD_GROUPS,
        "depth_1": NO_BLOCKS, "kv_fp8": NO_CACHE, "mixed_w8a8_w4": NO_ATTENTION, "reap_25": NO_EXPERTS,
        "rotate": NO_TOKENS, "gptq_mxfp4_hadamard": ODD_BLOCKS, "qat_mxfp4": ODD_COLUMNS,
    },
    "vit": {
        "gptq_q4_0": ODD_GROUPS, "rtn_q8_0": ODD_GROUPS,
        "kv_fp8": NO_CACHE, "reap_25": NO_EXPERTS, "rotate": NO_TOKENS, "nvfp4": ODD_COLUMNS,
        "gptq_mxfp4_hadamard": ODD_BLOCKS, "qat_mxfp4": ODD_COLUMNS, "qat_nvfp4": ODD_COLUMNS,
    },
    "llama": {"reap_25": NO_EXPERTS},
}  # fmt: skip
"""What a model does not have, a recipe cannot compress. No other refusal is allowed."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_runs_as_it_is_or_says_what_the_model_lacks(recipe, kind):
    make, batch = MODELS[kind]
    torch.manual_seed(0)
    model = make().eval()
    modifiers = load_recipe(recipe)
    for modifier in modifiers:
        if isinstance(modifier, AutoRoundModifier):
            modifier.iters = 1
    if (why := REFUSED[kind].get(recipe)) is not None:
        with pytest.raises(ValueError, match=why):
            compress(model, modifiers, [batch(), batch()])
        return
    compress(model, modifiers, [batch(), batch()])
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore")
def test_several_group_sizes_reload_in_plain_transformers(tmp_path):
    torch.manual_seed(0)
    model = llama().eval()
    batch = MODELS["llama"][1]()
    ledger = compress(model, load_recipe("gptq_w4"), [batch])
    sizes = {row.module.rpartition(".")[2]: row.scheme for row in ledger.rows}
    assert sizes == {
        "q_proj": "W4A16 g64 sym", "k_proj": "W4A16 g64 sym", "v_proj": "W4A16 g64 sym", "o_proj": "W4A16 g64 sym",
        "gate_proj": "W4A16 g64 sym", "up_proj": "W4A16 g64 sym", "down_proj": "W4A16 g128 sym",
    }  # fmt: skip
    save(model, tmp_path / "out")
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(plain(**batch).logits, model(**batch).logits)


@pytest.mark.filterwarnings("ignore")
def test_the_groups_of_the_docs_run_on_a_llama_and_reload_in_plain_transformers(tmp_path):
    docs = (Path(__file__).parents[1] / "docs" / "modifiers.md").read_text()
    (example,) = re.findall(r"```yaml\n(config_groups:.*?)```", docs, re.DOTALL)
    torch.manual_seed(0)
    model, batch = llama().eval(), MODELS["llama"][1]()
    ledger = compress(model, QuantizationModifier(**yaml.safe_load(example)))
    assert {(row.module.split(".")[3], row.scheme) for row in ledger} == {
        ("mlp", "W3A16 g64 sym"), ("mlp", "W3A16 g128 sym"), ("self_attn", "W8A16 channel sym")
    }  # fmt: skip
    assert len(ledger.rows) == 14
    save(model, tmp_path / "out")
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(plain(**batch).logits, model(**batch).logits)


class Classifier(LightningModule):
    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def training_step(self, batch, index):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
@pytest.mark.parametrize("recipe", ["structured_25", "distill_cached"])
def test_recipes_that_look_at_the_first_batch_train_as_they_are(tmp_path, monkeypatch, recipe, kind):
    monkeypatch.chdir(tmp_path)  # distill_cached writes teacher_cache there
    make, batch = MODELS[kind]
    loader = DataLoader(TensorDataset(batch(), torch.randint(10, (8,))), batch_size=4)
    model = make()
    before = sum(parameter.numel() for parameter in model.parameters())
    quiet(tmp_path, CompressionCallback(recipe=recipe), max_epochs=2).fit(Classifier(model), loader)
    after = sum(parameter.numel() for parameter in model.parameters())
    assert (0.5 * before < after < 0.85 * before) if recipe == "structured_25" else after == before
    assert (tmp_path / "compressed" / "model.safetensors").exists()
