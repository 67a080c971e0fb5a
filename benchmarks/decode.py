"""Tokens per second of a Llama-3-8B-shaped model, batch 1: bf16 and int4 weights, both in CUDA graphs.

One step is one graph: embed a token, 32 blocks with keys and values in static buffers, the logits, the next token. Both
models compute q, k, v and gate, up in one product each, and have the same values: the dense weights are the dequantized
packed ones. Embedding and output layer are dense in both. Each runs eagerly, and with the block compiled.
"""

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks import llama, machine
from benchmarks.checking import first_line
from benchmarks.decoder import Block, Decoder, Weight, decode_block
from benchmarks.replay import captured, elapsed, in_turn
from lightning_compress.ops.w4a16_gemm import dequantize, grid_rows, to_planes

__all__ = ["LLAMA", "TINY", "Found", "Job", "run", "table"]

DENSE, PACKED = "bf16", "W4"


@dataclass(frozen=True)
class Job:
    """What is decoded.

    Args:
        shape: Of the model.
        positions: T, as long as the buffers are.
        start: Where decoding begins; what lies before are random keys and values.
        tokens: Decoded in a round.
        group: Columns that share a scale.
        dtype: Of activations and dense weights.
        tolerance: Of the relative error of the packed model's logits against the dense one's.
    """

    shape: llama.Shape
    positions: int
    start: int
    tokens: int
    group: int
    dtype: torch.dtype
    tolerance: float


LLAMA = Job(llama.LLAMA_3_8B, 1024, 512, 64, 128, torch.bfloat16, 0.1)
TINY = Job(llama.TINY, 32, 8, 4, 32, torch.float32, 1e-4)


@dataclass
class Found:
    """What was measured.

    Args:
        tokens_per_second: By way, medians over rounds.
        raw: Seconds of a token, by way and round.
        errors: Relative errors of logits: packed against dense.
        bytes: Of all weights that a token reads, by format.
        floor: Tokens per second that the copy rate allows, by format.
        note: Why something is missing.
    """

    tokens_per_second: dict[str, float] = field(default_factory=dict)
    raw: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    floor: dict[str, float] = field(default_factory=dict)
    note: str = ""

    def best(self, format_: str) -> float | None:
        """Of the ways of a format."""
        rates = [rate for way, rate in self.tokens_per_second.items() if way.split(",")[0] == format_]
        return max(rates, default=None)

    @property
    def ratio(self) -> float | None:
        """The best of W4 over the best of bf16; None where one is missing."""
        packed, dense = self.best(PACKED), self.best(DENSE)
        return None if packed is None or dense is None else packed / dense


def random_blocks(job: Job, device: torch.device) -> tuple[list[Block], list[Block]]:
    """The same random weights, dense and packed."""
    random = torch.Generator(device).manual_seed(0)
    dense, packed = [], []
    for _ in range(job.shape.layers):
        ones = torch.ones(job.shape.hidden, device=device, dtype=job.dtype)
        norms = ones, ones.clone()
        pairs = {name: random_weight(N, K, job, random) for name, (N, K) in job.shape.products.items()}
        dense.append(Block(norms, **{name: pair[0] for name, pair in pairs.items()}))
        packed.append(Block(norms, **{name: pair[1] for name, pair in pairs.items()}))
    return dense, packed


def random_weight(N: int, K: int, job: Job, random: torch.Generator) -> tuple[Weight, Weight]:
    """Dense and packed, of a standard deviation near that of a trained layer."""
    device = random.device
    words = torch.randint(-(2**31), 2**31, (N, K // 8), generator=random, device=device).int()
    scale = (torch.rand(N, K // job.group, generator=random, device=device) * 0.5 + 0.75) * llama.INITIAL / 4.6
    scale = scale.to(job.dtype)  # codes from -8 to 7 deviate by 4.6
    scale_GN, _ = grid_rows(scale, None)
    return (dequantize(words, scale, None, K, job.dtype),), (to_planes(words), scale_GN)


def run(job: Job, device: torch.device, end: float | None = None, copied: float | None = None) -> Found:
    """Check the packed model against the dense one; on CUDA, time both.

    Args:
        job: The model.
        device: Where it runs.
        end: ``time.monotonic()`` after which nothing more is begun; None: never.
        copied: Bytes per second of a copy, for the floor.
    """
    found = Found()
    try:
        with torch.no_grad():
            decoders = both(job, device)
            found.bytes = {name: weight_bytes(decoder) for name, decoder in decoders.items()}
            found.floor = {} if copied is None else {name: copied / size for name, size in found.bytes.items()}
            found.errors = {PACKED: logits_error(job, decoders)}
            if not found.errors[PACKED] <= job.tolerance:
                error = found.errors[PACKED]
                found.note = f"wrong: relative error of logits {error:.1e}, at most {job.tolerance:.0e} was expected"
            elif device.type == "cuda":
                measure(job, decoders, end, found)
    except Exception as error:
        found.note = f"not run: {first_line(error)}"
    return found


def both(job: Job, device: torch.device) -> dict[str, Decoder]:
    dense, packed = random_blocks(job, device)
    H, vocabulary = job.shape.hidden, job.shape.vocabulary
    random = torch.Generator(device).manual_seed(1)
    embedding, head = (
        (torch.randn(vocabulary, H, generator=random, device=device) * llama.INITIAL).to(job.dtype) for _ in range(2)
    )
    ends = embedding, torch.ones(H, device=device, dtype=job.dtype), head
    blocks = {DENSE: dense, PACKED: packed}
    made = {name: Decoder(job.shape, weights, ends, job.positions) for name, weights in blocks.items()}
    for theirs, ours in zip(made[DENSE].caches, made[PACKED].caches, strict=True):
        for one, other in zip(theirs, ours, strict=True):
            other.copy_(one.normal_(generator=random))
    return made


def logits_error(job: Job, decoders: dict[str, Decoder]) -> float:
    """The largest over a few tokens, both models given the same ones."""
    worst = 0.0
    for number in range(job.tokens if job.tokens < 8 else 8):
        logits = []
        for decoder in decoders.values():
            decoder.begin(number, job.start + number)
            logits.append(decoder.step().double())
        error = ((logits[1] - logits[0]).norm() / logits[0].norm()).item()
        worst = error if not error <= worst else worst  # NaN stays
    return worst


def weight_bytes(decoder: Decoder) -> int:
    """That one token reads: all but the embedding, of which it reads a row."""
    tensors = [t for block in decoder.blocks for t in (*block.qkv, *block.o, *block.gate_up, *block.down)]
    return sum(t.nbytes for t in [*tensors, decoder.ends[2]])


def measure(job: Job, decoders: dict[str, Decoder], end: float | None, found: Found) -> None:
    """Rounds of some tokens each, all ways in turn."""
    runs: dict[str, Callable[[], float]] = {}
    for compiled in (False, True):
        if end is not None and time.monotonic() > end:
            found.note = f"no time was left{' for the compiled block' if compiled else ''}"
            break
        block = torch.compile(decode_block, fullgraph=True, dynamic=False) if compiled else decode_block
        for name, decoder in decoders.items():
            way = f"{name}, {'compiled block' if compiled else 'as it is'}"
            decoder.step_block = block
            decoder.begin(0, job.start)
            try:
                replay = captured([decoder.step])
            except Exception as error:
                found.note += f"{way}: {first_line(error)}; "
                continue
            runs[way] = functools.partial(one_round, job, decoder, replay)
    if runs:
        found.raw = in_turn(runs, 20, 5.0)
        found.tokens_per_second = {way: 1 / statistics.median(seconds) for way, seconds in found.raw.items()}


def one_round(job: Job, decoder: Decoder, replay: Callable[[], Any]) -> float:
    """Seconds of a token."""
    decoder.begin(0, job.start)
    return elapsed(lambda: [replay() for _ in range(job.tokens)]) / job.tokens


def table(found: Found) -> list[str]:
    """Markdown."""
    lines = [
        f"A Llama-3-8B-shaped model, random weights, batch 1, from position {LLAMA.start} on, {LLAMA.tokens} tokens a "
        "round, one CUDA graph a token.",
        "",
    ]
    rows = []
    for way in [f"{name}, {how}" for name in (DENSE, PACKED) for how in ("as it is", "compiled block")]:
        rate, name = found.tokens_per_second.get(way), way.split(",")[0]
        floor, size = found.floor.get(name), found.bytes.get(name)
        rows.append([
            way,
            f"{rate:.1f}" if rate else "",
            f"{size / 1e9:.2f}" if size else "",
            f"{rate / floor:.0%}" if rate and floor else "",
        ])  # fmt: skip
    lines += machine.table(["way", "tokens / s", "weights, GB", "of the copy rate"], rows)
    return [*lines, "", *([f"Note: {found.note}"] if found.note else [])]
