"""Time of a step of quantization-aware training on all Linears, relative to the plain step, and of its parts.

    make bench-qat-step                             # or: python benchmarks/bench_qat_step.py --help

One model of the demo's widths for each way to train; a step is forward, backward and AdamW, without a Trainer around
it. The ways alternate step by step, so that other load slows all of them equally. Times are CPU seconds of this
one-threaded process; figures are medians of the paired ratios over rounds, with a bootstrapped 95 % interval. The parts
of a step are measured by the same clock.
"""

import argparse
import time
import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import machine
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_compress import QATModifier
from lightning_compress.core import Event, EventType, Lifecycle, State

STATIC = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}
PARTS = ("forward", "backward", "optimizer", "events")
WAYS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "plain again": None,
    "ste, W4 g64": {"bits": 4, "gradient": "ste"},
    "lsq, W4 g64": {"bits": 4, "gradient": "lsq"},
    "lsq, W8 per row": {"bits": 8, "gradient": "lsq", "grain": "channel"},
    "lsq, W8A8 static": {"bits": 8, "gradient": "lsq", "grain": "channel", "inputs": STATIC},
    "lsq, W8A8 static, learned": {
        "bits": 8, "gradient": "lsq", "grain": "channel", "inputs": STATIC,
        "learn_activations": True, "observe_until": 1,
    },
    "lsq, W8A8 dynamic": {
        "bits": 8, "gradient": "lsq", "grain": "channel", "inputs": STATIC | {"dynamic": True, "strategy": "token"}
    },
}  # fmt: skip


class Trained:
    """A model, its optimizer, and the lifecycle around it.

    Args:
        way: Arguments of the QATModifier; None for the plain step.
        tokens: int64, [B, T].
    """

    def __init__(self, way: dict[str, Any] | None, tokens: Tensor):
        torch.manual_seed(0)
        self.tokens, self.steps = tokens, 0
        self.model: nn.Module = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=256, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=4, max_position_embeddings=1024,
            )
        ).train()  # fmt: skip
        self.lifecycle = None if way is None else Lifecycle([modifier(**way)])
        if self.lifecycle is not None:
            self.lifecycle.initialize(State(model=self.model))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)

    def step(self) -> list[float]:
        """One step, with every event of it; CPU seconds of the parts, as in PARTS."""
        marks = [time.process_time()]
        self._emit(EventType.BATCH_START)
        self.optimizer.zero_grad()
        marks.append(time.process_time())
        logits = self.model(input_ids=self.tokens, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), self.tokens[:, 1:].flatten())
        marks.append(time.process_time())
        self._emit(EventType.LOSS_CALCULATED)
        loss.backward()
        marks.append(time.process_time())
        self._emit(EventType.OPTIM_PRE_STEP)
        self.optimizer.step()
        marks.append(time.process_time())
        self.steps += 1
        self._emit(EventType.OPTIM_POST_STEP)
        self._emit(EventType.BATCH_END)
        marks.append(time.process_time())
        start, forward, backward, optimizer, end = (b - a for a, b in pairwise(marks))
        return [forward, backward, optimizer, start + end]

    def _emit(self, type_: EventType) -> None:
        if self.lifecycle is not None:
            self.lifecycle.emit(State(model=self.model), Event(type_, self.steps, global_batch=self.steps))


def modifier(
    bits: int, gradient: str, grain: str = "group", inputs: dict[str, Any] | None = None, **options: Any
) -> QATModifier:
    """QAT of every Linear, including the head."""
    grid = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": grain}
    grid |= {"group_size": 64} if grain == "group" else {}
    groups = {"all": {"targets": ["Linear"], "weights": grid, "input_activations": inputs}}
    return QATModifier(config_groups=groups, gradient=gradient, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=40, help="steps of each way")
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 2], help="blocks of 128 tokens in a step")
    machine.add_arguments(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    lines: list[str] = []
    facts: dict[str, Any] = {}
    for batch in arguments.batch:
        tokens = torch.randint(0, 256, (batch, 128), generator=torch.Generator().manual_seed(0))
        seconds = measure([Trained(way, tokens) for way in WAYS.values()], arguments.rounds)
        lines += [f"{batch} x 128 tokens:", "", *table(seconds), ""]
        facts[f"{batch} x 128 tokens"] = dict(zip(WAYS, seconds.transpose(0, 1).tolist(), strict=True))
    lines += [
        f"Medians of {arguments.rounds} steps of each way in turn, CPU time of one thread; 'plain again' is noise. "
        "The last columns are milliseconds over the plain step, of the parts of a step."
    ]
    print("\n".join(lines))
    if not arguments.dry:
        title = "A training step with QAT on all Linears, over the plain step"
        print("written:", machine.write("qat-step", title, lines, facts, arguments.machine))


def measure(trained: Sequence[Trained], rounds: int) -> Tensor:
    """CPU seconds: float64, [rounds, ways, parts]; the order changes from round to round."""
    seconds = torch.zeros(rounds, len(trained), len(PARTS), dtype=torch.float64)
    for number in range(-2, rounds):  # two rounds warm up
        for way in sorted(range(len(trained)), key=lambda way: (way + number) % len(trained)):
            seconds[max(number, 0), way] = torch.tensor(trained[way].step(), dtype=torch.float64)
    return seconds


def table(seconds: Tensor) -> list[str]:
    """Markdown lines: the step, its ratio, and the additional time of each part compared with the plain step."""
    whole, rows = seconds.sum(-1), []
    more = (seconds - seconds[:, :1]).median(0).values * 1e3
    for way, (name, column) in enumerate(zip(WAYS, whole.T, strict=True)):
        ratios = column / whole[:, 0]
        low, high = interval(ratios)
        ratio = "" if not way else f"{ratios.median():.3f} [{low:.3f}, {high:.3f}]"
        rows.append([name, f"{column.median() * 1e3:.1f}", ratio, *(f"{v:+.1f}" if way else "" for v in more[way])])
    return machine.table(["way", "step, ms", "over plain [95 %]", *(f"{part}, ms" for part in PARTS)], rows)


def interval(values: Tensor, draws: int = 4000) -> tuple[float, float]:
    """Bootstrap interval of the median."""
    picks = torch.randint(len(values), (draws, len(values)), generator=torch.Generator().manual_seed(0))
    medians = values[picks].median(1).values
    return medians.quantile(0.025).item(), medians.quantile(0.975).item()


if __name__ == "__main__":
    main()
