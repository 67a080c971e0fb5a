"""The main job: train a small Llama, compress it with GPTQ, export it, and load what was exported."""

import json
import math

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_compress import CompressionCallback, GPTQModifier, QuantizationModifier, load
from lightning_compress.modifiers.distillation.modifier import DistillationModifier
from lightning_compress.modifiers.magnitude import MagnitudePruningModifier
from lightning_compress.recipe import load_recipe
from tests.support.training_runs import Regression, Sums, quiet

transformers = pytest.importorskip("transformers")

VOCABULARY, TOKENS = 64, 24
W8A8, W4A16 = {"scheme": "W8A8"}, {"scheme": "W4A16", "group_size": 8}


class LanguageModel(LightningModule):
    def __init__(self):
        super().__init__()
        config = transformers.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
        )  # fmt: skip
        self.net = transformers.LlamaForCausalLM(config)

    def training_step(self, batch, batch_idx):
        return self.net(**batch).loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.net(**batch).loss)

    def test_step(self, batch, batch_idx):
        self.log("test/loss", self.net(**batch).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


class Counting(LightningDataModule):
    """Sequences that count in steps of 1 to 4."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        start = torch.randint(VOCABULARY, (24, 1), generator=generator)
        step = torch.randint(1, 5, (24, 1), generator=generator)
        self.rows = [{"input_ids": ids, "labels": ids} for ids in (start + step * torch.arange(TOKENS)) % VOCABULARY]

    def train_dataloader(self):
        return DataLoader(self.rows, 8, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.rows, 8)

    test_dataloader = val_dataloader


def run(folder, modifier, **options):
    torch.manual_seed(0)
    module, data = LanguageModel(), Counting()
    best = ModelCheckpoint(folder / "checkpoints", monitor="val/loss")
    callback = CompressionCallback(modifier, calibration_batches=4)
    trainer = quiet(folder, callback, best, **{"max_epochs": 2, **options})
    trainer.fit(module, data)
    return trainer, module, data


def gptq(**options):
    usual = {"scheme": "W4A16", "group_size": 32, "targets": ["Linear"], "ignore": ["lm_head"]}
    return GPTQModifier(**{**usual, **options})


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, *run(folder, gptq())


def test_transformers_loads_what_was_exported(compressed):
    folder, _, module, data = compressed
    batch = {"input_ids": torch.stack([row["input_ids"] for row in data.rows[:4]])}
    again = transformers.AutoModelForCausalLM.from_pretrained(folder / "compressed", dtype=torch.float32).eval()
    module.eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, module.net(**batch).logits, atol=1e-4, rtol=0)


def test_the_test_measures_what_the_report_says(compressed):
    folder, trainer, module, data = compressed
    (tested,) = trainer.test(module, data, ckpt_path="best", verbose=False)
    summary = json.loads((folder / "report" / "summary.json").read_text())
    assert summary["metric"]["nll"]["after"] == pytest.approx(tested["test/loss"], rel=1e-4)
    assert summary["metric"]["perplexity"]["after"] == pytest.approx(math.exp(tested["test/loss"]), rel=1e-4)
    assert summary["metric"]["nll"]["after"] != summary["metric"]["nll"]["before"]
    assert 0 < summary["metric"]["nll"]["standard_error"] < 0.1
    assert summary["evaluated_tokens"] == 24 * (TOKENS - 1)
    assert summary["modules"] == 14
    assert 5 < summary["bits_per_weight"] < 5.1  # a float32 scale for each 32 weights, and shapes
    assert summary["recipe"]["modifiers"]["GPTQModifier"]["scheme"] == "W4A16"
    assert summary["global_step"] == 6
    rows = (folder / "report" / "modules.csv").read_text().splitlines()
    assert len(rows) == 15


def test_the_export_holds_the_recipe(compressed):
    folder, trainer, _, _ = compressed
    (again,) = load_recipe(folder / "compressed" / "recipe.yaml")
    assert again.model_dump() == trainer.callbacks[0].lifecycle.modifiers[0].model_dump()


def test_two_runs_with_one_seed_give_the_same_bytes(compressed, tmp_path):
    run(tmp_path, gptq())
    for name in ("model.safetensors", "config.json", "recipe.yaml"):
        assert (tmp_path / "compressed" / name).read_bytes() == (compressed[0] / "compressed" / name).read_bytes()


def test_a_model_that_is_not_hugging_faces(tmp_path):
    module = Regression()
    callback = CompressionCallback(QuantizationModifier(scheme="W8A16", group_size=8, targets=["Linear"]))
    quiet(tmp_path, callback).fit(module, Sums())
    again = load(tmp_path / "compressed", Regression().model, packed=False)
    assert all(torch.equal(again.state_dict()[n], t) for n, t in module.model.state_dict().items())


@pytest.mark.parametrize(("scheme", "lacking"), [(W8A8, True), (W4A16, False)])
def test_what_a_checkpoint_does_not_hold_is_said_in_a_new_process(tmp_path, scheme, lacking, recwarn):
    def mse(folder, module, **options):
        trainer = quiet(folder, CompressionCallback(QuantizationModifier(**scheme)))
        return trainer.test(module, Sums(), verbose=False, **options)[0]["test/mse"]

    trainer, module = quiet(tmp_path, CompressionCallback(QuantizationModifier(**scheme))), Regression()
    trainer.fit(module, Sums())
    measured = trainer.test(module, Sums(), verbose=False)[0]["test/mse"]
    fresh, checkpoint = Regression(), tmp_path / "compressed.ckpt"
    bare = mse(tmp_path / "fresh", fresh, ckpt_path=checkpoint)
    told = [str(w.message) for w in recwarn if "this checkpoint holds the compressed weights" in str(w.message)]
    assert len(told) == lacking
    assert all("but not the quantization of activations: the model runs without" in text for text in told)
    assert (bare != measured) == lacking
    fresh.model = load(tmp_path / "compressed", Regression().model, packed=False)
    assert mse(tmp_path / "whole", fresh) == measured
    recwarn.clear()
    mse(tmp_path / "both", fresh, ckpt_path=checkpoint)
    assert not [w for w in recwarn if "this checkpoint holds" in str(w.message)]


def test_bf16_true(tmp_path):
    modifier = QuantizationModifier(scheme="W8A16", group_size=32, targets=["Linear"], ignore=["lm_head"])
    limits = {"max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 1}
    _, module, _ = run(tmp_path, modifier, precision="bf16-true", **limits)
    assert next(module.parameters()).dtype == torch.bfloat16
    assert (tmp_path / "compressed" / "model.safetensors").exists()


def test_a_wrong_recipe_fails_before_training(tmp_path):
    class Trains(Regression):
        def training_step(self, batch, batch_idx):
            raise AssertionError("hours of training")

    with pytest.raises(ValueError, match="does not divide|groups|group_size"):
        quiet(tmp_path, CompressionCallback(gptq(group_size=3))).fit(Trains(), Sums())
    with pytest.raises(ValueError, match="matches none"):
        quiet(tmp_path, CompressionCallback(gptq(targets=["Conv7d"]))).fit(Trains(), Sums())
    assert list(tmp_path.iterdir()) == []


def test_prune_distil_and_quantize_in_one_run(tmp_path):
    """And trap 7: a teacher is in no state_dict and no optimizer."""
    recipe = {
        "prune": MagnitudePruningModifier(targets=["Linear"], final_sparsity=0.5, start=0, end=4, update=1),
        "distil": DistillationModifier(teacher=Regression().model, weight=0.5),
        "round": QuantizationModifier(scheme="W8A16", group_size=8, targets=["Linear"]),
    }
    module = Regression()
    keys, callback = list(module.state_dict()), CompressionCallback(recipe)
    trainer = quiet(tmp_path, callback, max_epochs=2)
    trainer.fit(module, Sums())
    weights = module.model[0].weight
    assert (weights == 0).float().mean() >= 0.5
    assert {row.technique for row in callback.ledger.rows} >= {"rtn"}
    saved = torch.load(tmp_path / "compressed.ckpt", weights_only=True)
    assert list(saved["state_dict"]) == keys
    assert sum(len(group["params"]) for group in trainer.optimizers[0].param_groups) == len(keys)
    kept = saved["callbacks"]["CompressionCallback"]["recipe"]["modifiers"]
    assert kept["DistillationModifier"]["teacher"] == "<Sequential>"
    assert torch.equal(load(tmp_path / "compressed", Regression().model, packed=False)[0].weight, weights)


def test_a_recipe_that_only_prunes_leaves_a_folder_too(tmp_path):
    modifier = MagnitudePruningModifier(targets=["Linear"], ignore=["lm_head"], final_sparsity=0.5)
    _, module, data = run(tmp_path, modifier, max_epochs=1)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "compressed", dtype=torch.float32).eval()
    batch = {"input_ids": torch.stack([row["input_ids"] for row in data.rows[:4]])}
    module.eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, module.net(**batch).logits, atol=1e-5, rtol=0)
    assert (again.model.layers[0].mlp.up_proj.weight == 0).float().mean() == 0.5
    summary = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert summary["sparsity"] == pytest.approx(0.5)
    assert summary["export_dir"] == str(tmp_path / "compressed")


def test_a_model_that_cannot_be_written_is_said_and_stays_in_the_checkpoint(tmp_path):
    class Odd(torch.nn.Sequential):
        def get_extra_state(self):
            return {"calls": 1}

        def set_extra_state(self, state):
            pass

    modifier = MagnitudePruningModifier(targets=["Linear"], final_sparsity=0.5)
    module = Regression()
    module.model = Odd(*module.model)
    with pytest.warns(UserWarning, match="nothing is exported, and compressed.ckpt alone holds the model: "):
        quiet(tmp_path, CompressionCallback(modifier)).fit(module, Sums())
    assert (tmp_path / "compressed.ckpt").exists()
