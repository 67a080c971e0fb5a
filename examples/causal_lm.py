"""A causal language model as a LightningModule: next-token loss and perplexity, AdamW with a cosine schedule.

A batch is a dict with ``input_ids``, int64 [B, T]; token t + 1 is predicted from tokens 0..t.
"""

import math
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.text import Perplexity

Batch = dict[str, Tensor]


class CausalLM(lightning.LightningModule):
    """Trains and measures a Hugging Face style causal language model.

    Logs ``train/loss``, ``val/loss``, ``val/perplexity``, ``test/loss``, ``test/perplexity``; losses in nats per token.

    Args:
        model: Takes ``input_ids`` and returns an object with ``logits`` [B, T, V].
        lr: Peak learning rate of AdamW.
        weight_decay: For matrices only, not for vectors (norms, biases).
        warmup_share: Share of the steps in which the learning rate rises; then a cosine decays it to a tenth.
    """

    def __init__(self, model: nn.Module, lr: float, weight_decay: float, warmup_share: float) -> None:
        super().__init__()
        self.model = model
        self.lr, self.weight_decay, self.warmup_share = lr, weight_decay, warmup_share
        self.val_perplexity = Perplexity()
        self.test_perplexity = Perplexity()

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits [B, T, V] of tokens [B, T]."""
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss, _ = self._loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._measure(batch, "val", self.val_perplexity)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._measure(batch, "test", self.test_perplexity)

    def _measure(self, batch: Batch, stage: str, perplexity: Perplexity) -> None:
        loss, logits = self._loss(batch)
        ids = batch["input_ids"]
        perplexity.update(logits[:, :-1].float(), ids[:, 1:])
        self.log(f"{stage}/loss", loss, prog_bar=True, batch_size=len(ids), sync_dist=True)
        self.log(f"{stage}/perplexity", perplexity, prog_bar=True, batch_size=len(ids))

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        ids = batch["input_ids"]
        logits = self(ids)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()), logits

    def configure_optimizers(self) -> Any:
        """AdamW; linear warm-up, then half a cosine, one step of the schedule per optimizer step."""
        matrices = [p for p in self.model.parameters() if p.requires_grad and p.ndim >= 2]
        vectors = [p for p in self.model.parameters() if p.requires_grad and p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": self.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.95))
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_share(step, steps, self.warmup_share))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def lr_share(step: int, steps: int, warmup_share: float, floor: float = 0.1) -> float:
    """The learning rate at a step as a share of its peak: linear warm-up, then cosine decay to ``floor``."""
    warmup = max(1, round(steps * warmup_share))
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))
