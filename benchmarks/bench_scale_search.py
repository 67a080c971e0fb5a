"""Rounding SmolLM2 to nearest with scales from the extremes, from diag(H), from the complete H of each group.

    make bench-data && python benchmarks/bench_scale_search.py          # prints a table; --help for its sizes

KL(dense || rounded) on two texts that do not overlap with the calibration text. Weights stay float32.
"""

import argparse
import copy
import time
from pathlib import Path

import smollm2
import torch
from transformers.utils import logging

from lightning_compress import QuantizationModifier, compress

SEARCHES = ("minmax", "imatrix", "hessian")


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    folder, texts = arguments.material / "models/smollm2", arguments.material / "texts"
    tokenizer, dense = smollm2.load_tokenizer(folder), smollm2.load(folder)
    shape = arguments.windows, arguments.window_length
    windows = {name: smollm2.evaluation_windows(tokenizer, texts, name, *shape) for name in smollm2.EVALUATION_TEXTS}
    wanted = {name: smollm2.dense_logits(dense, window) for name, window in windows.items()}
    rows = smollm2.calibration_rows(tokenizer, texts, arguments.rows, arguments.length, arguments.subset)
    batches = [{"input_ids": row[None]} for row in rows]
    print(f"| bits | scale_search | {' | '.join(f'KL, {name}' for name in windows)} | CPU seconds |", flush=True)
    for bits in arguments.bits:
        for search in arguments.searches:
            model, start = copy.deepcopy(dense), time.process_time()
            modifier = QuantizationModifier(
                scheme=f"W{bits}A16", group_size=arguments.group, ignore=["lm_head"], scale_search=search
            )
            compress(model, modifier, batches if modifier.needs.data else None)
            seconds = time.process_time() - start
            kl = [smollm2.divergence(model, windows[name], wanted[name])[0].mean().item() for name in windows]
            figures = " | ".join(f"{value:.3f}" for value in kl)
            print(f"| {bits} | `{search}` | {figures} | {seconds:.0f} |", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--material", type=Path, default=Path("benchmarks/work"), help="what `make bench-data` filled")
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3])
    parser.add_argument("--searches", nargs="+", choices=SEARCHES, default=list(SEARCHES))
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--rows", type=int, default=16, help="calibration rows")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--subset", type=int, default=0, help="which of three disjoint calibration subsets")
    parser.add_argument("--windows", type=int, default=4, help="evaluation windows per text")
    parser.add_argument("--window-length", type=int, default=256)
    return parser.parse_args()


if __name__ == "__main__":
    main()
