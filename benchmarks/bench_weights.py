"""Techniques on weights that are not on a grid: SmolLM2-135M moved off the 4-bit grid of its published weights.

    make bench-weights                              # or: python benchmarks/bench_weights.py --help

Accuracy of RTN, GPTQ, AWQ, AWQ + GPTQ, rotation + GPTQ and AutoRound at 4, 3 and 2 bits in symmetric groups of 64, and
of SparseGPT and Wanda at 50 %, 2:4 and 70 %, with OWL and without. moved_weights.py makes the model; the reference is
this moved model, dense. 16 rows x 256 calibration tokens, this package only, every run in a separate process. The same
for the demo's model, which was never quantized: bench_demo.py.

Divergence and perplexity as in bench_accuracy.py.
"""

import argparse
import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import machine
import smollm2
import torch
from bench_accuracy import cached_dense_logits, dense_file, stacked
from bench_techniques import scored, spread
from measured_run import Job, in_own_process
from techniques import PRUNERS, QUANTIZERS

Known = dict[str, dict[str, dict[str, Any]]]  # row -> subset -> facts and scores


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    model, texts = arguments.material / "models/smollm2-moved", arguments.material / "texts"
    tokenizer = smollm2.load_tokenizer(model)
    names = smollm2.EVALUATION_TEXTS
    windows = smollm2.windows_of_all(tokenizer, texts, arguments.windows)
    work = arguments.material / "moved"
    work.mkdir(exist_ok=True)
    dense = cached_dense_logits(model, windows, work)
    notes = work / "weights.json"
    known: Known = json.loads(notes.read_text()) if arguments.resume and notes.exists() else {}
    rows = {f"W{b} {name}": {"bits": b, **QUANTIZERS[name]} for b in arguments.bits for name in arguments.methods}
    rows |= {name: PRUNERS[name] for name in arguments.pruners}
    for subset in map(str, range(arguments.subsets)):
        for row, fields in rows.items():
            scores = known.setdefault(row, {})
            if subset in scores:
                continue
            out = work / f"out-{os.getpid()}"
            job = Job("ours", "smollm2", str(model), str(texts), str(out), subset=int(subset), walk="auto")
            job = replace(job, iters=arguments.iters, **fields)
            facts = in_own_process(job, "")
            scores[subset] = facts | scored(job, out, dense_file(windows, work), "")
            shutil.rmtree(out)
            notes.write_text(json.dumps(known))
            kl, nll = (torch.tensor(scores[subset][field], dtype=torch.float64) for field in ("kl", "nll"))
            both = " ".join(f"{math.exp(part.mean()):.2f}" for part in nll.chunk(len(names)))
            print(f"{row}, subset {subset}: {facts['cpu_s']:.1f} CPU s, KL {kl.mean():.4f}, ppl {both}", flush=True)
    lines = report(known, list(rows), dense, arguments)
    print("\n".join(lines))
    if not arguments.dry:
        title = "Techniques on weights off the grid: SmolLM2-135M, moved"
        facts = {"dense_nll": dense.losses.tolist(), "scores": {row: known[row] for row in rows}}
        print("written:", machine.write("weights", title, lines, facts, arguments.machine))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--material", type=Path, default=Path("benchmarks/work"), help="what `make bench-moved` filled")
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3, 2])
    quick = [method for method in QUANTIZERS if not method.startswith("AutoRound")]
    parser.add_argument(
        "--methods",
        nargs="*",
        choices=list(QUANTIZERS),
        default=quick,
        metavar="METHOD",
        help=f"of {', '.join(QUANTIZERS)}; those of AutoRound take an hour for each number of bits",
    )
    parser.add_argument(
        "--pruners",
        nargs="*",
        choices=list(PRUNERS),
        default=list(PRUNERS),
        metavar="PRUNER",
        help=f"of {', '.join(PRUNERS).replace('%', '%%')}",
    )
    parser.add_argument("--iters", type=int, default=100, help="of AutoRound, for each block")
    parser.add_argument("--subsets", type=int, default=1)
    parser.add_argument("--windows", type=int, default=3, help="evaluation windows of 512 tokens per text")
    parser.add_argument("--resume", action="store_true", help="keep what an interrupted run of this bench has measured")
    machine.add_arguments(parser)
    return parser.parse_args()


def report(known: Known, rows: list[str], dense: smollm2.DenseLogits, arguments: argparse.Namespace) -> list[str]:
    """The table, as Markdown."""
    texts = smollm2.EVALUATION_TEXTS
    head = ["", "KL, nats per token", *(f"ppl {text}" for text in texts), "CPU s"]
    table = [["dense", "0", *(f"{smollm2.perplexity(part):.2f}" for part in dense.losses.chunk(len(texts))), ""]]
    for row in rows:
        kl, nll = stacked(known[row], "kl"), stacked(known[row], "nll")
        each = kl.mean(1)
        several = f" ({each.min():.4f} to {each.max():.4f})" if len(each) > 1 else ""
        perplexities = [f"{math.exp(part.mean()):.4g}" for part in nll.chunk(len(texts), dim=1)]
        cpu = spread([facts["cpu_s"] for facts in known[row].values()])
        table.append([row, f"{kl.mean():.4f}{several}", *perplexities, cpu])
    return [
        f"## 16 x 256 calibration tokens, {arguments.subsets} subset(s), {arguments.windows} x 512 tokens of each text",
        "",
        *machine.table(head, table),
        "",
        "Symmetric integers in groups of 64, `lm_head` dense; AWQ scales and rounds, in front of GPTQ it only scales; "
        "rotation: R1 and R2, random Hadamard"
        + (f"; AutoRound: {arguments.iters} steps a block. " if any("AutoRound" in row for row in rows) else ". ")
        + "KL over the dense model's top 512 classes and the rest.",
    ]


if __name__ == "__main__":
    main()
