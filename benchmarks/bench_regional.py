"""Wanda and Wanda++: divergence from the dense model and CPU seconds, SmolLM2-135M, two of four weights.

    python benchmarks/bench_regional.py --help

Calibration rows, evaluation windows and KL as in bench_accuracy.py. A variant is a list of arguments of
WandaPruningModifier, separated by commas: ``regional_gradient=100,regional_rounds=5,regional_steps=8``; ``wanda``:
without arguments.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import smollm2
import torch

from lightning_compress import WandaPruningModifier, compress


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    model, texts = arguments.material / "models/smollm2", arguments.material / "texts"
    tokenizer = smollm2.load_tokenizer(model)
    windows = smollm2.windows_of_all(tokenizer, texts, arguments.windows)
    dense = smollm2.dense_logits(smollm2.load(model), windows)
    print("dense: " + perplexities(dense.losses), flush=True)
    for variant in arguments.variants:
        for subset in range(arguments.subsets):
            rows = smollm2.calibration_rows(tokenizer, texts, arguments.rows, arguments.length, subset)
            pruned = smollm2.load(model)
            modifier = WandaPruningModifier(ignore="lm_head", mask_structure="2:4", **parsed(variant))
            began = time.process_time()
            compress(pruned, modifier, [{"input_ids": row[None]} for row in rows])
            seconds = time.process_time() - began
            kl, losses = smollm2.divergence(pruned, windows, dense)
            print(
                f"{variant}, subset {subset}: KL {kl.mean():.4f}, {perplexities(losses)}, {seconds:.0f} CPU seconds",
                flush=True,
            )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--material", type=Path, default=Path("benchmarks/work"), help="what `make bench-data` filled")
    parser.add_argument("--variants", nargs="+", default=["wanda", "regional_gradient=100"])
    parser.add_argument("--subsets", type=int, default=1, help="calibration subsets, of three")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=2, help="evaluation windows of 512 tokens per text")
    return parser.parse_args()


def parsed(variant: str) -> dict[str, Any]:
    """The arguments that a variant names."""
    pairs = [] if variant == "wanda" else [part.split("=") for part in variant.split(",")]
    return {name: float(value) if "." in value or "e" in value else int(value) for name, value in pairs}


def perplexities(losses: torch.Tensor) -> str:
    """Of each text."""
    parts = losses.chunk(len(smollm2.EVALUATION_TEXTS))
    return ", ".join(
        f"{name} {smollm2.perplexity(part):.2f}" for name, part in zip(smollm2.EVALUATION_TEXTS, parts, strict=True)
    )


if __name__ == "__main__":
    main()
