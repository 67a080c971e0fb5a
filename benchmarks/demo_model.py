"""The demo's model for the benches: trained once by train.py, and measured on held-out text, block by block.

At 4 bits the differences are far smaller than the spread between blocks of text, so they are taken block by block
(paired). Beside the loss stands KL(dense || compressed), which sees every change of the prediction and not only that of
the byte that came.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Scores:
    """One model on the held-out text, in nats per token of each block.

    Args:
        losses: Next-token loss, float64 [blocks].
        kl: KL(dense || model), float64 [blocks].
    """

    losses: Tensor
    kl: Tensor


def demo_config(out: Path, *overrides: str) -> DictConfig:
    """conf/train.yaml without a logger and without the test at its end."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("train", ["test=false", "logger=none", *overrides])
    with open_dict(config):
        config.paths = {"work_dir": str(ROOT), "output_dir": str(out.resolve())}
    OmegaConf.resolve(config)
    return config


def train_once(config: DictConfig) -> Path:
    """Train as the demo does, unless an earlier call has; the best checkpoint."""
    best = Path(config.paths.output_dir) / "checkpoints/best.ckpt"
    if not best.exists():
        sys.path.insert(0, str(ROOT))
        from train import train

        train(config)
    return best


def load(config: DictConfig, checkpoint: Path) -> Any:
    """The LightningModule of the config with the weights of a checkpoint."""
    module = instantiate(config.model)
    module.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"])
    return module


@torch.no_grad()
def measure(model: nn.Module, dense: nn.Module, batches: list[Tensor]) -> Scores:
    """Both figures of each block of the batches, int64 [B, T] each."""
    losses, kls = [], []
    for ids in batches:
        log_q, log_p = (_predictions(m.eval(), ids) for m in (model, dense))
        each = nn.functional.nll_loss(log_q.transpose(1, 2), ids[:, 1:], reduction="none")
        losses.append(each.double().mean(1))
        kls.append((log_p.exp() * (log_p - log_q)).sum(-1).double().mean(1))
    return Scores(torch.cat(losses), torch.cat(kls))


def _predictions(model: nn.Module, ids: Tensor) -> Tensor:
    """Log-probabilities of tokens 1..T-1: float32, [B, T-1, V]."""
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return logits.float().log_softmax(-1)


def mean_and_error(values: Tensor, form: str) -> str:
    """Mean and standard error over blocks."""
    error = values.std() / math.sqrt(len(values))
    return f"{values.mean():{form}} ± {error:{form.lstrip('+')}}"
