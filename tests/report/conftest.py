"""A ledger with two techniques, figures that add up by hand, and the facts of a run."""

from typing import Any

import pytest

from lightning_compress.core.ledger import Ledger


@pytest.fixture
def ledger() -> Ledger:
    made = Ledger()
    for block in range(4):
        for name, error, size in (("q_proj", 0.001, 1000), ("down_proj", 0.01, 3000)):
            made.add(
                f"layers.{block}.{name}", "gptq", scheme="W4A16 g128", error=error * (block + 1), sqnr_db=20.0 - block,
                bits=4.25, params=size, bytes_before=2 * size, bytes_after=size // 2 + 32, seconds=0.5, tokens=64,
            )  # fmt: skip
    made.add("lm_head", "rtn", scheme="W8A16", error=0.5, bits=8.5, params=8000, bytes_before=16000, bytes_after=8500)
    made.add("layers.0.q_proj", "gptq", flag="fell back to rounding")
    return made


@pytest.fixture
def facts() -> dict[str, Any]:
    return {
        "model": "LlamaForCausalLM",
        "recipe": "gptq_w4",
        "metric": {"perplexity": {"before": 5.3, "after": 5.3125, "difference": 0.0125, "standard_error": 0.0031}},
        "model_bytes_before": 8 * 1024**2,
        "model_bytes_after": 3 * 1024**2,
        "seconds": {"calibration": 12.5, "export": 0.25},
        "peak_memory_bytes": 3 * 1024**3,
        "seed": 0,
        "export_dir": "compressed",
    }
