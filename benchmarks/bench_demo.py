"""The demo's model at 4, 3 and 2 bits, and pruned, by every technique. Prints the table of docs/benchmarks.md.

    make bench-demo                                 # or: python benchmarks/bench_demo.py --help

Trains the model of `make demo` once, by train.py with conf/train.yaml (or uses --checkpoint), then compresses copies of
it and measures each on the same held-out text, with many more tokens than the demo uses: at 4 bits the differences are
far smaller than the spread between blocks of text, so they are paired by block and have a standard error over blocks.
The table has the loss and KL(dense || compressed), which depends on the complete prediction and not only on the byte
that follows. This model was never quantized: its weights are not on a quantization grid.
"""

import argparse
import copy
import time
from dataclasses import dataclass
from pathlib import Path

import lightning
import machine
import torch
from demo_model import Scores, demo_config, load, mean_and_error, measure, train_once
from hydra.utils import instantiate
from measured_run import Job
from omegaconf import DictConfig
from techniques import PRUNERS, QUANTIZERS, ours

from lightning_compress import compress

QUICK = [method for method in QUANTIZERS if not method.startswith("AutoRound")]


@dataclass(frozen=True)
class Measured:
    """One row of the table.

    Args:
        bits: Of a weight; 16: none was quantized.
        method: How it was compressed.
        scores: On the held-out text.
        cpu_s: CPU seconds of the compression.
    """

    bits: int
    method: str
    scores: Scores
    cpu_s: float = 0.0


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    config = demo_config(arguments.out, f"data.test_blocks={arguments.blocks}")
    model = load(config, arguments.checkpoint or train_once(config))
    data = instantiate(config.data)
    data.setup("test")
    held_out = [batch["input_ids"] for batch in data.test_dataloader()]
    calibration = list(data.calibration_dataloader())[: arguments.calibration_batches]
    results = [Measured(16, "dense", measure(model.model, model.model, held_out))]
    jobs = [(bits, method, QUANTIZERS[method]) for bits in arguments.bits for method in arguments.methods]
    jobs += [(16, method, PRUNERS[method]) for method in arguments.pruners]
    for bits, method, fields in jobs:
        copied = copy.deepcopy(model.model)
        job = Job("ours", "smollm2", "", "", bits=bits, group=arguments.group, **fields)
        began = time.process_time()
        compress(copied, ours(job), calibration)
        cpu_s = time.process_time() - began
        results.append(Measured(bits, method, measure(copied, model.model, held_out), cpu_s))
        print(row(results[-1], results), flush=True)
    lines = report(results, config, len(calibration), arguments)
    print("\n".join(lines))
    if not arguments.dry:
        facts = {
            f"W{r.bits} {r.method}": {"nll": r.scores.losses.tolist(), "kl": r.scores.kl.tolist()} for r in results
        }
        title = "The demo's model at 4, 3 and 2 bits, and pruned"
        print("written:", machine.write("demo", title, lines, {"blocks": facts}, arguments.machine))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--checkpoint", type=Path, help="a trained demo model, such as logs/demo/checkpoints/best.ckpt")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/work/demo"), help="where training writes")
    parser.add_argument("--blocks", type=int, default=2048, help="held-out blocks, spread over the test text")
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3, 2])
    parser.add_argument(
        "--methods",
        nargs="*",
        choices=list(QUANTIZERS),
        default=QUICK,
        metavar="METHOD",
        help=f"of {', '.join(QUANTIZERS)}; those of AutoRound take minutes for each number of bits",
    )
    parser.add_argument(
        "--pruners",
        nargs="*",
        choices=list(PRUNERS),
        default=list(PRUNERS),
        metavar="PRUNER",
        help=f"of {', '.join(PRUNERS).replace('%', '%%')}",
    )
    parser.add_argument("--group", type=int, default=128, help="columns that share a scale")
    parser.add_argument("--calibration-batches", type=int, default=16)
    machine.add_arguments(parser)
    return parser.parse_args()


def row(measured: Measured, results: list[Measured]) -> list[str]:
    """Perplexity; the paired difference to the dense model, and KL, with standard errors; what is left of RTN's KL."""
    dense = next(r for r in results if r.method == "dense").scores
    scores = measured.scores
    cells = [str(measured.bits), measured.method, f"{scores.losses.mean().exp():.4f}"]
    if scores is dense:
        return [*cells, "", "", "", ""]
    rounded = next((r for r in results if r.method == "RTN" and r.bits == measured.bits), measured).scores
    left = "" if rounded is scores else f"{scores.kl.mean() / rounded.kl.mean():.2f}"
    gap, kl = mean_and_error(scores.losses - dense.losses, "+.5f"), mean_and_error(scores.kl, ".6f")
    return [*cells, gap, kl, left, f"{measured.cpu_s:.1f}"]


def report(results: list[Measured], config: DictConfig, calibration: int, arguments: argparse.Namespace) -> list[str]:
    """The table, as Markdown."""
    blocks, length = len(results[0].scores.losses), config.data.block_length
    head = ["bits", "method", "perplexity", "loss - dense, nats per token", "KL to dense", "KL / RTN's", "CPU s"]
    return [
        *machine.table(head, [row(r, results) for r in results]),
        "",
        f"Symmetric integers in groups of {arguments.group} columns, `lm_head` dense; {blocks * (length - 1):,} "
        f"held-out tokens in {blocks} blocks, {calibration * config.data.batch_size * length:,} calibration tokens. "
        f"Differences are paired by block, ± is their standard error. GPTQ searches its scales by the Hessian (the "
        f"default); `minmax` is the plain one. AWQ scales and rounds; in front of GPTQ it only scales. Rotation: R1 "
        f"and R2. AutoRound begins with GPTQ's solution. PyTorch {torch.__version__}, Lightning "
        f"{lightning.__version__}, "
        f"seed {config.seed}.",
    ]


if __name__ == "__main__":
    main()
