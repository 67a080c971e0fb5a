"""4-bit floats with and without block Hadamards: SmolLM2 in MXFP4 and NVFP4, weights alone and with activations.

    make bench-hadamard                             # or: python benchmarks/bench_hadamard.py --help

Rounding to nearest and GPTQ (on request with dense targets, and tuned), of the model as it is and after
BlockHadamardModifier with blocks of 16, 32 and 64 (128 does not divide the 576 columns of this model). KL to the dense
model as in smollm2.py, on two texts, CPU seconds of a single thread. `--model smollm2-moved` takes the weights off
their published 4-bit grid (`make bench-moved`). Each cell runs in this process, on a copy of the dense model; outputs
are those of the model in memory.
"""

import argparse
import copy
import json
import time
import warnings
from pathlib import Path
from typing import Any

import machine
import smollm2
import torch
from torch import Tensor, nn
from transformers.utils import logging

from lightning_compress import (
    BlockHadamardModifier,
    GPTQModifier,
    Modifier,
    QuantizationModifier,
    TuneModifier,
    compress,
)

QUANTIZERS = ("rounding", "GPTQ", "GPTQ, dense targets", "GPTQ, dense targets, tune")
SCHEMES = ("MXFP4A16", "MXFP4", "NVFP4A16", "NVFP4")
BLOCKS = (0, 16, 32, 64)  # 0: none


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable_progress_bar()
    folder, texts = arguments.material / "models" / arguments.model, arguments.material / "texts"
    tokenizer, dense = smollm2.load_tokenizer(folder), smollm2.load(folder)
    windows = smollm2.windows_of_all(tokenizer, texts, arguments.windows)
    wanted = smollm2.dense_logits(dense, windows)
    rows = smollm2.calibration_rows(tokenizer, texts, arguments.tokens // 256, 256, arguments.subset)
    batches = [{"input_ids": pair} for pair in rows.split(2)]
    notes = arguments.material / f"hadamard-{arguments.model}-{arguments.tokens}.json"
    known: dict[str, Any] = json.loads(notes.read_text()) if arguments.resume and notes.exists() else {}
    for scheme in arguments.schemes:
        for quantizer in arguments.quantizers:
            for block in arguments.blocks:
                cell = f"{scheme}, {quantizer}, {block}"
                if cell not in known:
                    known[cell] = measured(dense, modifiers(scheme, quantizer, block), batches, windows, wanted)
                    notes.write_text(json.dumps(known))
                    print(f"{cell}: KL {mean(known[cell]):.4f}, {known[cell]['cpu_s']:.0f} CPU s", flush=True)
    lines = report(known, arguments)
    print("\n".join(lines))
    if not arguments.dry:
        title = f"Block Hadamards for 4-bit floats: {arguments.model}, {arguments.tokens} calibration tokens"
        facts = {"dense_nll": wanted.losses.tolist(), "cells": known}
        print("written:", machine.write(f"hadamard-{arguments.model}", title, lines, facts, arguments.machine))


def modifiers(scheme: str, quantizer: str, block: int) -> list[Modifier]:
    """The recipe of one cell."""
    recipe: list[Modifier] = [BlockHadamardModifier(block_size=block)] if block else []
    if quantizer == "rounding":
        return [*recipe, QuantizationModifier(scheme=scheme, ignore=["lm_head"])]
    target = "dense" if "dense" in quantizer else "layer"
    recipe.append(GPTQModifier(scheme=scheme, ignore=["lm_head"], target=target))
    return [*recipe, TuneModifier(epochs=4, lr=5e-4)] if "tune" in quantizer else recipe


def measured(
    dense: nn.Module, recipe: list[Modifier], batches: list[Any], windows: Tensor, wanted: smollm2.DenseLogits
) -> dict[str, Any]:
    """KL and loss of each window, and the CPU seconds of compression."""
    model, start = copy.deepcopy(dense), time.process_time()
    compress(model, recipe, batches)
    seconds = time.process_time() - start
    kl, nll = smollm2.divergence(model, windows, wanted)
    return {"kl": kl.tolist(), "nll": nll.tolist(), "cpu_s": seconds}


def mean(cell: dict[str, Any]) -> float:
    return sum(cell["kl"]) / len(cell["kl"])


def report(known: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    """The table: a row for each scheme and quantizer, a column for each block; cells that were not run are named."""
    names = ["none" if block == 0 else f"blocks of {block}" for block in arguments.blocks]
    rows = []
    for scheme in arguments.schemes:
        for quantizer in arguments.quantizers:
            cells = [known.get(f"{scheme}, {quantizer}, {block}") for block in arguments.blocks]
            seconds = [cell["cpu_s"] for cell in cells if cell]
            figures = [f"{mean(cell):.4f}" if cell else "not run" for cell in cells]
            spread = f"{min(seconds):.0f} to {max(seconds):.0f}" if seconds else ""
            rows.append([scheme, quantizer, *figures, spread])
    return [
        *machine.table(["scheme", "", *names, "CPU s"], rows),
        "",
        f"KL to the dense model, nats per token, {arguments.windows} x 512 tokens of each of two texts; "
        f"{arguments.tokens} calibration tokens, subset {arguments.subset}.",
    ]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--material", type=Path, default=Path("benchmarks/work"), help="what `make bench-data` filled")
    parser.add_argument("--model", default="smollm2", choices=["smollm2", "smollm2-moved"])
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--quantizers", nargs="+", choices=QUANTIZERS, default=["rounding", "GPTQ"])
    parser.add_argument("--blocks", nargs="+", type=int, choices=BLOCKS, default=list(BLOCKS))
    parser.add_argument("--tokens", type=int, default=4096, help="of calibration, in rows of 256")
    parser.add_argument("--subset", type=int, default=0, help="which of three disjoint calibration subsets")
    parser.add_argument("--windows", type=int, default=3, help="evaluation windows of 512 tokens per text")
    parser.add_argument("--resume", action="store_true", help="keep what an interrupted run of this bench has measured")
    machine.add_arguments(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
