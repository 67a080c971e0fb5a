"""The encoder of the benches: all-MiniLM-L6-v2, judged by the cosine between its embeddings and the dense model's.

384 and 1536 columns divide by 128, so the preset W4A16 fits. Rows are [CLS] tokens [SEP] of one length, no padding.
"""

from pathlib import Path
from typing import Any

import torch
from smollm2 import EVALUATION_TEXTS
from torch import Tensor, nn


def calibration_rows(tokenizer: Any, texts: Path, rows: int, length: int) -> Tensor:
    """Rows spread evenly over the calibration text: int64, [rows, length]."""
    return rows_of(tokenizer, texts / "calib_mix.txt", rows, length)


def evaluation_rows(tokenizer: Any, texts: Path, rows: int, length: int) -> Tensor:
    """``rows`` from each evaluation text: int64, [2 * rows, length]."""
    return torch.cat([rows_of(tokenizer, texts / f"{name}.txt", rows, length) for name in EVALUATION_TEXTS])


def rows_of(tokenizer: Any, file: Path, rows: int, length: int) -> Tensor:
    ids = tokenizer(file.read_text(encoding="utf8"), add_special_tokens=False)["input_ids"]
    stride, inner = len(ids) // rows, length - 2
    if stride < inner:
        raise SystemExit(f"{rows} rows of {length} do not fit into the {len(ids)} tokens of {file.name}")
    begin, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    return torch.tensor([[begin, *ids[row * stride :][:inner], end] for row in range(rows)])


@torch.no_grad()
def embeddings(model: nn.Module, rows: Tensor) -> Tensor:
    """Mean over the tokens, normalized, as in the model card: float32, [rows, 384]."""
    states = model(input_ids=rows, attention_mask=torch.ones_like(rows)).last_hidden_state
    return nn.functional.normalize(states.mean(1), dim=-1)


def load(folder: Path) -> nn.Module:
    """The checkpoint in fp32, in plain transformers."""
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
