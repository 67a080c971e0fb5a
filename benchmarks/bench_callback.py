"""Cost of the callback in a training step while no modifier is active.

    make bench-callback                             # or: python benchmarks/bench_callback.py --help

Three fits alternate in one process: without the callback, without it again (the noise of the measurement itself), and
with `CompressionCallback` around a modifier whose window never opens. Measured are CPU seconds of this one-threaded
process from the start of one training batch to the start of a later one, which includes all events of a step, and
excludes set-up and the end of the run. Two models: the demo's Llama, and two Linears of 32 columns, where a step is
almost nothing but Lightning's own bookkeeping (the worst case). Figures are medians over rounds of paired differences;
intervals are bootstrapped, 95 %.
"""

import argparse
import contextlib
import cProfile
import gc
import io
import logging
import pstats
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import machine
import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_compress import CompressionCallback, Modifier

ROOT = Path(__file__).resolve().parents[1]
ARMS = ("without", "without again", "with")


class Asleep(Modifier):
    """A modifier whose window never opens."""

    start: float | None = 1e12

    def on_initialize(self, state: Any, **kwargs: Any) -> bool:
        return True


class TwoLinears(lightning.LightningModule):
    """A tiny model, whose step is mostly Lightning's own work."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(batch["x"]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Stopwatch(Callback):
    """CPU seconds between the starts of two training batches."""

    def __init__(self, first: int, last: int):
        self.marks: dict[int, float] = {}
        self.first, self.last = first, last

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx in (self.first, self.last):
            self.marks[batch_idx] = time.process_time()

    @property
    def seconds_per_step(self) -> float:
        return (self.marks[self.last] - self.marks[self.first]) / (self.last - self.first)


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    cases = {
        "two Linears": (TwoLinears, tiny_batch(), arguments.steps),
        "the demo's Llama": (demo_model, demo_batch(), max(8, arguments.steps // 50)),
    }
    rows, facts = [], {}
    for name, (make, batch, steps) in cases.items():
        if arguments.profile:
            profile(make, batch, steps)
            continue
        seconds = measure(make, batch, steps, arguments.rounds)
        facts[name] = {arm: column.tolist() for arm, column in zip(ARMS, seconds.T, strict=True)}
        rows.append([name, f"{seconds[:, 0].median() * 1e6:.0f}", *difference(seconds, 1), *difference(seconds, 2)])
        print(rows[-1], flush=True)
    if not arguments.profile:
        publish(rows, facts, arguments)


def publish(rows: list[list[str]], facts: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Print the table, and write it unless it is a dry run."""
    head = ["model", "step, us", "noise, us [95 %]", "noise, %", "callback, us [95 %]", "callback, %"]
    lines = [
        *machine.table(head, rows),
        "",
        f"Medians of {arguments.rounds} rounds, CPU time of one thread; noise is a second fit without the callback.",
        *in_proportion(facts),
    ]
    print("\n".join(lines))
    if not arguments.dry:
        title = "The callback's cost per training step with no modifier active"
        print("written:", machine.write("callback", title, lines, facts, arguments.machine))


def in_proportion(facts: dict[str, Any]) -> list[str]:
    """The cost measured with the small model, whose noise is microseconds, as a share of a step of the large one."""
    small, large = ({arm: torch.tensor(v, dtype=torch.float64) for arm, v in arms.items()} for arms in facts.values())
    cost = (small["with"] - small["without"]).median()
    step = large["without"].median()
    first, second = facts
    share = f"{cost / step * 100:.3f} % of a step of {second} ({step * 1e3:.0f} ms)"
    return [f"The cost does not depend on the model: the {cost * 1e6:.0f} us of {first} are {share}."]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=400, help="steps of a fit of the small model")
    parser.add_argument("--profile", action="store_true", help="print where the time of a fit with the callback goes")
    machine.add_arguments(parser)
    return parser.parse_args()


def tiny_batch() -> dict[str, Tensor]:
    return {"x": torch.randn(8, 32, generator=torch.Generator().manual_seed(0))}


def demo_batch() -> dict[str, Tensor]:
    """Bytes in the shape that the demo trains on: int64, [B, T]."""
    data = OmegaConf.load(ROOT / "conf/data/stdlib.yaml")
    generator = torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(0, 256, (data.batch_size, data.block_length), generator=generator)}


def demo_model() -> lightning.LightningModule:
    """The demo's model, with the numbers of conf/model/llama_demo.yaml."""
    from hydra.utils import instantiate

    return instantiate(OmegaConf.load(ROOT / "conf/model/llama_demo.yaml"))


def measure(make: Callable[[], lightning.LightningModule], batch: dict[str, Tensor], steps: int, rounds: int) -> Tensor:
    """CPU seconds of a step: float64, [rounds, arms]. The order of the arms turns from round to round."""
    seconds = torch.zeros(rounds, len(ARMS), dtype=torch.float64)
    for number in range(-1, rounds):  # round -1 warms up
        for arm in sorted(range(len(ARMS)), key=lambda arm: (arm + number) % len(ARMS)):
            seconds[max(number, 0), arm] = fit(make, batch, steps, with_callback=ARMS[arm] == "with")
    return seconds


def fit(
    make: Callable[[], lightning.LightningModule], batch: dict[str, Tensor], steps: int, with_callback: bool
) -> float:
    """CPU seconds of a step in one fit."""
    torch.manual_seed(0)
    stopwatch = Stopwatch(first=steps // 10, last=steps - 1)
    callbacks: list[Callback] = [stopwatch]
    if with_callback:
        callbacks.append(CompressionCallback(Asleep(), evaluate=False, load_best=False))
    folder = tempfile.TemporaryDirectory()  # the callback's report goes there
    trainer = lightning.Trainer(
        default_root_dir=folder.name,
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = make()
    gc.collect()
    with folder, contextlib.redirect_stdout(io.StringIO()):
        trainer.fit(model, DataLoader([batch] * steps, batch_size=None))
    return stopwatch.seconds_per_step


def difference(seconds: Tensor, arm: int) -> list[str]:
    """Median paired difference of an arm to the first: in microseconds with its interval, and in percent."""
    gaps = (seconds[:, arm] - seconds[:, 0]) * 1e6
    shares = (seconds[:, arm] / seconds[:, 0] - 1) * 100
    low, high = interval(gaps)
    share_low, share_high = interval(shares)
    return [
        f"{gaps.median():+.1f} [{low:+.1f}, {high:+.1f}]",
        f"{shares.median():+.2f} [{share_low:+.2f}, {share_high:+.2f}]",
    ]


def interval(values: Tensor, draws: int = 4000) -> tuple[float, float]:
    """Bootstrap interval of the median."""
    picks = torch.randint(len(values), (draws, len(values)), generator=torch.Generator().manual_seed(0))
    medians = values[picks].median(1).values
    return medians.quantile(0.025).item(), medians.quantile(0.975).item()


def profile(make: Callable[[], lightning.LightningModule], batch: dict[str, Tensor], steps: int) -> None:
    """Print the functions of this package that take most time in a fit with the callback."""
    profiler = cProfile.Profile()
    profiler.enable()
    fit(make, batch, steps, with_callback=True)
    profiler.disable()
    pstats.Stats(profiler).sort_stats("cumulative").print_stats("lightning_compress|Asleep", 25)


if __name__ == "__main__":
    main()
