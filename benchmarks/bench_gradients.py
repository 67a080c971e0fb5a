"""What gradients add to GPTQ: tokens weighed by the loss, then scales and norms trained; and what that costs.

    make bench-gradients                            # or: python benchmarks/bench_gradients.py --help

SmolLM2-135M, symmetric integers in groups of 64, the same calibration tokens for all rows of a table, one thread.
llm-compressor's GPTQ, this package's, and the same with `objective: loss`, with TuneModifier, and with both; and with
schemes that an AllocateModifier chooses within the bits of the scheme everywhere, which are 32 / 64 more than those of
codes, as scales are float32. Groups of 192 columns everywhere show what their size alone brings. Every run is a
separate process; exports are evaluated by plain transformers (scored.py). KL and perplexity as in bench_accuracy.py:
differences from the row GPTQ have intervals of a bootstrap over subsets and windows. `--model smollm2-moved` takes the
weights off their published 4-bit grid (`make bench-moved`).
"""

import argparse
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import machine
import smollm2
import torch
from bench_accuracy import bootstrap, cached_dense_logits, dense_file, interval, stacked
from bench_techniques import scored, spread
from measured_run import Job, in_own_process

PEER, PLAIN = "llm-compressor GPTQ", "GPTQ"
ROWS: dict[str, dict[str, Any]] = {  # row of the table -> fields of Job
    PEER: {"library": "peer", "technique": "gptq"},
    PLAIN: {"technique": "gptq"},
    "GPTQ by the loss": {"technique": "gptq by loss"},
    "GPTQ, tune": {"technique": "gptq+tune"},
    "GPTQ by the loss, tune": {"technique": "gptq by loss+tune"},
    "GPTQ, groups of 192": {"technique": "gptq", "group": 192},
    "GPTQ, allocated": {"technique": "allocate+gptq"},
    "GPTQ, allocated, groups of 64": {"technique": "allocate+gptq", "groups": [64]},
    "GPTQ by the loss, allocated": {"technique": "allocate+gptq by loss"},
    "GPTQ, allocated, tune": {"technique": "allocate+gptq+tune"},
    "GPTQ for dense targets": {"technique": "gptq for dense"},
    "GPTQ for dense targets, tune": {"technique": "gptq for dense+tune"},
    "GPTQ for dense targets by the loss": {"technique": "gptq for dense by loss"},
    "GPTQ for dense targets by the loss, tune": {"technique": "gptq for dense by loss+tune"},
}
Known = dict[str, dict[str, dict[str, Any]]]  # "bits, row" -> subset -> facts and scores


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    model, texts = arguments.material / "models" / arguments.model, arguments.material / "texts"
    tokenizer = smollm2.load_tokenizer(model)
    windows = smollm2.windows_of_all(tokenizer, texts, arguments.windows)
    work = arguments.material / f"gradients-{arguments.model}"
    work.mkdir(exist_ok=True)
    dense = cached_dense_logits(model, windows, work)
    notes = work / f"gradients-{arguments.tokens}.json"
    known: Known = json.loads(notes.read_text()) if arguments.resume and notes.exists() else {}
    for subset in map(str, range(arguments.subsets)):
        for bits in arguments.bits:
            for row in arguments.rows:
                scores = known.setdefault(f"{bits}, {row}", {})
                if subset in scores:
                    continue
                out = work / f"out-{os.getpid()}"
                fields = {
                    "library": "ours", "task": "smollm2", "model": str(model), "texts": str(texts), "out": str(out),
                    "rows": arguments.tokens // 256, "batch": arguments.batch, "bits": bits, "subset": int(subset),
                    "walk": "auto", "epochs": arguments.epochs, "lr": 1e-3 if bits < 4 else 5e-4,
                }  # fmt: skip
                job = Job(**fields | ROWS[row])
                facts = in_own_process(job, arguments.peer_python)
                scores[subset] = facts | scored(job, out, dense_file(windows, work), arguments.peer_python)
                shutil.rmtree(out)
                notes.write_text(json.dumps(known))
                kl = torch.tensor(scores[subset]["kl"], dtype=torch.float64)
                print(f"W{bits}, subset {subset}, {row}: {facts['cpu_s']:.1f} CPU s, KL {kl.mean():.4f}", flush=True)
    lines = [line for bits in arguments.bits for line in [*report(bits, known, dense, arguments), ""]]
    print("\n".join(lines))
    if not arguments.dry:
        title = f"GPTQ with gradients: {arguments.model}, {arguments.tokens} calibration tokens"
        facts = {"dense_nll": dense.losses.tolist(), "scores": known}
        what = f"gradients-{arguments.model}-{arguments.tokens}"
        print("written:", machine.write(what, title, lines, facts, arguments.machine))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--material", type=Path, default=Path("benchmarks/work"), help="what `make bench-data` filled")
    parser.add_argument("--peer-python", default=".venv-peer/bin/python", help="python with llmcompressor")
    parser.add_argument("--model", default="smollm2", choices=["smollm2", "smollm2-moved"])
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--tokens", type=int, default=4096, help="of calibration, in rows of 256")
    parser.add_argument("--batch", type=int, default=2, help="rows of a batch, which is one step of tuning")
    parser.add_argument("--epochs", type=int, default=4, help="of tuning")
    parser.add_argument("--subsets", type=int, default=3)
    parser.add_argument("--windows", type=int, default=3, help="evaluation windows of 512 tokens per text")
    parser.add_argument("--resume", action="store_true", help="keep what an interrupted run of this bench has measured")
    parser.add_argument("--machine", default="", help="name of this machine in the file name of the result")
    parser.add_argument("--dry", action="store_true", help="print only, write no result")
    return parser.parse_args()


def report(bits: int, known: Known, dense: smollm2.DenseLogits, arguments: argparse.Namespace) -> list[str]:
    """The table of one number of bits, as Markdown."""
    texts = smollm2.EVALUATION_TEXTS
    head = [
        "",
        "bits",
        "KL, nats per token",
        "over llm-compressor's",
        "KL - GPTQ's [95 %]",
        *(f"ppl {text}" for text in texts),
    ]
    head += ["CPU s", "peak MiB"]
    dense_cells = [f"{smollm2.perplexity(part):.2f}" for part in dense.losses.chunk(len(texts))]
    rows = [["dense", "32", "0", "", "", *dense_cells, "", ""]]
    by_row = {row: known.get(f"{bits}, {row}", {}) for row in arguments.rows}
    for row, scores in by_row.items():
        kl, nll = stacked(scores, "kl"), stacked(scores, "nll")
        peer, plain = by_row.get(PEER), by_row.get(PLAIN)
        ratio = f"{kl.mean() / stacked(peer, 'kl').mean():.2f}" if peer else ""
        gap = ""
        if plain and row not in (PEER, PLAIN):
            difference, draws = kl - stacked(plain, "kl"), bootstrap(*kl.shape, len(texts))
            low, high = interval([difference[s][:, w].mean().item() for s, w in draws])
            gap = f"{difference.mean():+.4f} [{low:+.4f}, {high:+.4f}]"
        perplexities = [f"{math.exp(part.mean()):.4g}" for part in nll.chunk(len(texts), dim=1)]
        peak = max(facts["rss_peak_mib"] for facts in scores.values())
        cpu = spread([facts["cpu_s"] for facts in scores.values()])
        stored = next((facts["bits"] for facts in scores.values() if facts.get("bits")), bits + 32 / 64)
        rows.append([row, f"{stored:.2f}", f"{kl.mean():.4f}", ratio, gap, *perplexities, cpu, f"{peak:.0f}"])
    return [
        f"## W{bits}, groups of 64, {arguments.tokens} calibration tokens, {arguments.subsets} subset(s), "
        f"{arguments.windows} x 512 tokens of each text",
        "",
        *machine.table(head, rows),
        "",
        f"Batches of {arguments.batch} rows of 256 tokens; tuning: {arguments.epochs} epochs at most, "
        f"lr {1e-3 if bits < 4 else 5e-4:g}, an eighth of the batches held out.",
    ]


if __name__ == "__main__":
    main()
