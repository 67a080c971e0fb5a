"""Calibration on several ranks: how many codes differ from those of one process, and CPU seconds of each rank.

    make bench-ranks                                # or: python benchmarks/bench_ranks.py --help

A Llama of 4 blocks with random weights and outlier columns (3,014,656 codes), 24 batches of 256 tokens, gloo processes
on this machine with one thread each. For each recipe the processes of 1, 2, 3 and 4 ranks follow one another, in
rounds; each returns the CPU seconds of ``compress`` and a checksum of its model, rank 0 the exported file too. Seconds
are medians over rounds of the busiest rank.
"""

import argparse
import hashlib
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import machine
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_compress import (
    AWQModifier,
    GPTQModifier,
    Modifier,
    SmoothQuantModifier,
    SparseGPTModifier,
    WandaPruningModifier,
    compress,
    save,
)
from lightning_compress.team import Team

SIZES = (1, 2, 3, 4)
VOCABULARY, TOKENS = 512, 256
STATIC = {
    "all": {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, "type": "int", "strategy": "channel"},
        "input_activations": {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False},
    }
}
W4 = {"scheme": "W4A16", "ignore": ["lm_head"]}
RECIPES: dict[str, Callable[[], list[Modifier]]] = {
    "GPTQ W4": lambda: [GPTQModifier(**W4)],
    "GPTQ W8A8, static inputs": lambda: [GPTQModifier(config_groups=STATIC, ignore=["lm_head"])],
    "SparseGPT 50 %": lambda: [SparseGPTModifier(sparsity=0.5, ignore=["lm_head"])],
    "Wanda 2:4": lambda: [WandaPruningModifier(mask_structure="2:4", ignore=["lm_head"])],
    "SmoothQuant, GPTQ W8A8": lambda: [SmoothQuantModifier(), GPTQModifier(scheme="W8A8", ignore=["lm_head"])],
    "AWQ W4": lambda: [AWQModifier(**W4)],
}


def model() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_key_value_heads=4, vocab_size=VOCABULARY, tie_word_embeddings=False)
    llama = LlamaForCausalLM(config).eval()
    for block in llama.model.layers:
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            norm.weight.data.mul_(torch.randn(256).exp())  # outlier columns, as real models have them
    return llama


def batches(count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    share = 1 / torch.arange(1, VOCABULARY + 1, dtype=torch.float32)
    draw = partial(torch.multinomial, share, TOKENS, replacement=True, generator=generator)
    return [{"input_ids": draw()[None]} for _ in range(count)]


def enter(rank: int, size: int, recipe: str, count: int, folder: Path) -> None:
    """Work of one rank."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    llama, data, team = model(), batches(count), Team.of_processes()
    start = time.process_time()
    compress(llama, RECIPES[recipe](), data, team=team)
    seconds = time.process_time() - start
    values = (p.detach() + 0.0 for p in llama.parameters())  # a process alone has zeros with a sign, which codes lack
    digest = hashlib.sha256(b"".join(value.numpy().tobytes() for value in values)).hexdigest()
    torch.save({"seconds": seconds, "sha256": digest}, folder / f"{rank}.pt")
    if rank == 0:
        save(llama, folder / "model")


def run(size: int, recipe: str, count: int) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """What each rank returns, and the tensors that rank 0 exported."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes.start_processes(enter, args=(size, recipe, count, folder), nprocs=size, start_method="forkserver")
        tensors = load_file(folder / "model" / "model.safetensors")
        return [torch.load(folder / f"{rank}.pt") for rank in range(size)], tensors


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> tuple[int, int]:
    """How many values of the weights differ (of packed ones the 4-bit codes), and how many there are."""
    count = total = 0
    for name in (name for name in one if "_proj.weight" in name):
        values = [unpacked(tensors[name]) if name.endswith("packed") else tensors[name] for tensors in (one, other)]
        count, total = count + int((values[0] != values[1]).sum()), total + values[0].numel()
    return count, total


def unpacked(packed: Tensor) -> Tensor:
    """Eight 4-bit codes of each int32."""
    return (packed[..., None] >> torch.arange(0, 32, 4)) & 15


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=24)
    parser.add_argument("--recipes", nargs="*", default=[name for name in RECIPES if together(name)])
    options = parser.parse_args(arguments)
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # in Python 3.11 the server imports before it gets sys.path
    multiprocessing.set_forkserver_preload(["bench_ranks"])
    rows, facts = [], {}
    for recipe in options.recipes:
        seconds: dict[int, list[float]] = {size: [] for size in SIZES}
        hashes: set[str] = set()
        codes = {}
        for _ in range(options.rounds):
            for size in SIZES:
                ranks, tensors = run(size, recipe, options.batches)
                seconds[size].append(max(rank["seconds"] for rank in ranks))
                hashes |= {rank["sha256"] for rank in ranks}
                codes.setdefault(size, tensors)
        counts = {size: differing(codes[1], codes[size]) for size in SIZES}
        median = {size: statistics.median(values) for size, values in seconds.items()}
        total = counts[1][1]
        differ = ", ".join(f"{counts[size][0]:,}" for size in SIZES[1:])
        ratios = [f"{median[size] / median[1]:.2f}" for size in SIZES[1:]]
        rows.append([recipe, f"{total:,}", differ, len(hashes), f"{median[1]:.2f}", *ratios])
        facts[recipe] = {"differing": counts, "models": len(hashes), "cpu_seconds": seconds}
        print(*rows[-1], sep=" | ", flush=True)
    head = [
        "recipe",
        "codes and scales",
        "differ on 2, 3, 4 ranks",
        "different models",
        "CPU s alone",
        "2 ranks",
        "3",
        "4",
    ]
    lines = [
        f"`make bench-ranks`, {options.rounds} rounds, one thread for each rank; the last three columns are the CPU",
        "seconds of the busiest rank over those of a single process.",
        "",
        *machine.table(head, rows),
    ]
    print(machine.write("ranks", "Calibration on several ranks", lines, facts))


def together(recipe: str) -> bool:
    """Whether ranks calibrate together with this recipe."""
    return all(modifier.needs.team != "alone" for modifier in RECIPES[recipe]())


if __name__ == "__main__":
    main()
