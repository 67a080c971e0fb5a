"""Packed Linears and models on a CPU compared with dense ones: CPU seconds of one thread.

    make bench-packed                               # or: python benchmarks/bench_packed_cpu.py --help

Contestants alternate call by call, so that other load slows all of them equally; a figure is the median over rounds
of the ratio to the dense float32 Linear (or model) of the same round. The packed ones are those that
``lightning_compress.load`` takes by default; quantizing the tokens is part of their time.
"""

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import machine
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_compress import QuantizationModifier, compress, load, save
from lightning_compress.quant.packed import PackedLinear

SHAPES = [(576, 576), (1536, 576), (576, 1536), (2048, 2048), (4096, 4096)]  # N, K
TOKENS = [1, 2, 4, 8, 16, 32, 128]
WAYS = ["dense bf16", "W4A16 bf16", "W8A16 bf16", "W8A8 fp32", "W8A8 bf16"]
MODEL = {
    "vocab_size": 1024, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 6,
    "num_attention_heads": 9, "num_key_value_heads": 3,
}  # fmt: skip
Call = Callable[[], Any]


def seconds(call: Call, repeat: int) -> float:
    start = time.thread_time()
    for _ in range(repeat):
        call()
    return (time.thread_time() - start) / repeat


def paired(calls: Mapping[str, Call], baseline: str, rounds: int, least: float) -> dict[str, dict[str, float]]:
    """Median milliseconds of each, and the median ratio of the baseline's time to its time (above 1: quicker)."""
    repeat = {}
    for name, call in calls.items():
        call()
        repeat[name] = max(1, int(least / max(seconds(call, 1), 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call, repeat[name]))
    return {
        name: {
            "ms": 1e3 * statistics.median(found),
            "speed": statistics.median(b / t for b, t in zip(times[baseline], found, strict=True)),
        }
        for name, found in times.items()
    }


def quantized(N: int, K: int, scheme: str, dtype: torch.dtype) -> nn.Module:
    """A packed Linear; W8A16 by row, W4A16 in groups of 64."""
    torch.manual_seed(0)
    holder = nn.Sequential(nn.Linear(K, N, bias=False, dtype=dtype))
    size = {"W4A16": 64, "W8A16": -1}.get(scheme)
    compress(holder, QuantizationModifier(targets=["Linear"], scheme=scheme, group_size=size))
    return PackedLinear.from_quantized(holder[0])


def layers(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for N, K in SHAPES[: arguments.shapes]:
        dense = nn.Linear(K, N, bias=False)
        modules = {"dense fp32": dense, "dense bf16": nn.Linear(K, N, bias=False, dtype=torch.bfloat16)}
        for way in WAYS[1:]:
            scheme, dtype = way.split()
            modules[way] = quantized(N, K, scheme, torch.float32 if dtype == "fp32" else torch.bfloat16)
        for M in TOKENS:
            x = torch.randn(1, M, K)
            inputs = {name: x if name.endswith("fp32") else x.bfloat16() for name in modules}
            calls = {name: (lambda f=modules[name], x=inputs[name]: f(x)) for name in modules}
            ways = paired(calls, "dense fp32", arguments.rounds, arguments.least)
            rows.append({"N": N, "K": K, "M": M, "ways": ways})
            print(N, K, M, {name: round(found["speed"], 2) for name, found in rows[-1]["ways"].items()}, flush=True)
    return rows


def decode(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Greedy decode of 16 tokens after 8, batch 1, of a small Llama."""
    torch.manual_seed(0)
    ids = torch.randint(1024, (1, 8))
    models: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as root:
        for name, scheme, dtype in (("fp32", "W8A8", torch.float32), ("bf16", "W4A16", torch.bfloat16)):
            model: Any = LlamaForCausalLM(LlamaConfig(**MODEL)).to(dtype).eval()
            models[f"dense {name}"] = LlamaForCausalLM(LlamaConfig(**MODEL)).to(dtype).eval()
            size = 64 if scheme == "W4A16" else None
            compress(model, QuantizationModifier(scheme=scheme, group_size=size, ignore=["lm_head"]), [ids])
            folder = save(model, Path(root) / scheme)
            models[f"{scheme} {name}, packed=False"] = load(folder, packed=False)
            models[f"{scheme} {name}, fuse=False"] = load(folder, fuse=False)
            models[f"{scheme} {name}"] = load(folder)
    options = {"do_sample": False, "max_new_tokens": 16, "min_new_tokens": 16, "pad_token_id": 0}
    calls = {name: (lambda model=model: model.generate(ids, **options)) for name, model in models.items()}
    return paired(calls, "dense fp32", arguments.rounds, 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--least", type=float, default=0.01, help="seconds of each timed burst")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="the first of the shapes only")
    parser.add_argument("--machine", default="")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with torch.no_grad():
        rows, whole = layers(arguments), decode(arguments)
    lines = [
        "Speed beside the dense float32 Linear: its CPU time over that of the way, median of "
        f"{arguments.rounds} rounds; one thread, torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}. "
        "W4A16 in groups of 64, W8A16 and W8A8 by row; tokens are quantized within the time of W8A8.",
        "",
        *machine.table(
            ["N x K", "M", "dense fp32, ms", *WAYS],
            [
                [f"{row['N']} x {row['K']}", row["M"], f"{row['ways']['dense fp32']['ms']:.3f}",
                 *(f"{row['ways'][way]['speed']:.2f}" for way in WAYS)]
                for row in rows
            ],
        ),
        "",
        f"Greedy decode of 16 tokens after 8 by a Llama of {MODEL['num_hidden_layers']} layers, hidden size 576 "
        "(`generate`, batch 1):",
        "",
        *machine.table(
            ["model", "ms", "speed beside dense fp32"],
            [[name, f"{found['ms']:.0f}", f"{found['speed']:.2f}"] for name, found in whole.items()],
        ),
    ]  # fmt: skip
    facts = {"rounds": arguments.rounds, "layers": rows, "decode": whole}
    print(machine.write("packed-cpu", "Packed weights on a CPU", lines, facts, arguments.machine))


if __name__ == "__main__":
    main()
