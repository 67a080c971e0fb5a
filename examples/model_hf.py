"""Any causal language model of the Hugging Face hub, or of a folder, with its tokenizer."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.causal_lm import CausalLM


class PretrainedLM(CausalLM):
    """A pretrained model, for fine-tuning or for compression without training.

    Args:
        path: Folder or hub name.
        dtype: ``float32`` (by far the fastest on a CPU), ``bfloat16``, ``float16``, or ``auto``: the stored dtype.
        lr: Peak learning rate.
        weight_decay: For matrices only.
        warmup_share: Share of the steps in which the learning rate rises.
    """

    def __init__(
        self, path: str, dtype: str = "float32", lr: float = 2e-5, weight_decay: float = 0.0, warmup_share: float = 0.05
    ) -> None:
        model = AutoModelForCausalLM.from_pretrained(path, dtype="auto" if dtype == "auto" else getattr(torch, dtype))
        super().__init__(model, lr, weight_decay, warmup_share)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.save_hyperparameters()
