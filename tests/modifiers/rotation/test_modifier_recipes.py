"""``+compress=[rotate,gptq_w4a4]`` at the end of a training run: the export is what the run has measured."""

import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch import LightningModule
from torch.testing import assert_close
from torch.utils.data import DataLoader

from lightning_compress import CompressionCallback, load
from lightning_compress.recipe import load_recipe
from tests.support.rotation_models import build, token_batches
from tests.support.training_runs import quiet


class Language(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = build("llama", tie_word_embeddings=True)

    def training_step(self, batch, batch_idx):
        return self.net(**batch, labels=batch["input_ids"]).loss

    def test_step(self, batch, batch_idx):
        self.log("test/loss", self.net(**batch, labels=batch["input_ids"]).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def test_the_recipes_stack(app_config):
    callback = instantiate(app_config("+compress=[rotate,gptq_w4a4]").callbacks.compress)
    assert [type(m).__name__ for m in callback.lifecycle.modifiers] == ["RotationModifier", "GPTQModifier"]


@pytest.mark.filterwarnings("ignore:.*shared its weight with the embeddings")
@pytest.mark.parametrize(
    "settings", [{}, {"learn": True, "learn_steps": 10, "learn_tokens": 64}], ids=["random", "learned"]
)
def test_a_trained_model_is_rotated_quantized_exported_and_tested(tmp_path, settings):
    rows = [{"input_ids": row} for batch in token_batches(4) for row in batch["input_ids"]]
    loader = DataLoader(rows, 4)
    modifiers = [*load_recipe("rotate"), *load_recipe("gptq_w4a4")]
    modifiers[0] = type(modifiers[0])(**settings)
    callback = CompressionCallback(modifiers, module="net", evaluate=False, calibration_batches=3)
    model, trainer = Language(), quiet(tmp_path, callback)
    trainer.fit(model, loader)
    assert not model.net.config.tie_word_embeddings
    (before,) = trainer.test(model, loader, verbose=False)
    (best,) = trainer.test(model, loader, ckpt_path=str(tmp_path / "compressed.ckpt"), verbose=False)
    assert best == before
    with torch.no_grad():
        batch = token_batches(1)[0]
        assert_close(load(tmp_path / "compressed")(**batch).logits, model.net.eval()(**batch).logits, rtol=0, atol=0)
