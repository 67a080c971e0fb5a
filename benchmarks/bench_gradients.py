"""What gradients add to GPTQ: tokens weighed by the loss, then scales and norms trained; and what that costs.

    make bench-gradients                            # or: python benchmarks/bench_gradients.py --help

SmolLM2-135M, the same calibration tokens for all rows of a table, one thread: symmetric integers in groups of 64, 4-bit
floats (NVFP4, MXFP4; A16: weights alone), and pruned weights. llm-compressor's GPTQ, this package's, and the same with
`objective: loss`, with `target: dense`, with TuneModifier, and with combinations; and with schemes that an
AllocateModifier chooses within the bits of the scheme everywhere, which are 32 / 64 more than those of codes, as scales
are float32. Groups of 192 columns everywhere show what their size alone brings. Every run is a separate process;
exports are evaluated by plain transformers (scored.py). KL and perplexity as in bench_accuracy.py: differences from the
row GPTQ (SparseGPT) have intervals of a bootstrap over subsets and windows. `--model smollm2-moved` takes the
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

PEER, PLAIN = ("llm-compressor GPTQ", "llm-compressor SparseGPT"), ("GPTQ", "SparseGPT")
SCHEMES: dict[str, dict[str, Any]] = {  # fields of Job
    "W4": {"bits": 4, "lr": 5e-4},
    "W3": {"bits": 3, "lr": 1e-3},
    "W2": {"bits": 2, "lr": 1e-3},
    **{name: {"scheme": name, "lr": 5e-4} for name in ("NVFP4A16", "MXFP4A16", "NVFP4", "MXFP4")},
    "50 %": {"sparsity": 0.5, "lr": 1e-4},
    "2:4": {"mask": "2:4", "lr": 1e-4},
}
QUANTIZED: dict[str, dict[str, Any]] = {  # row of the table -> fields of Job
    PEER[0]: {"library": "peer", "technique": "gptq"},
    PLAIN[0]: {"technique": "gptq"},
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
    "GPTQ for dense targets, allocated": {"technique": "allocate+gptq for dense"},
    "GPTQ for dense targets, allocated, tune": {"technique": "allocate+gptq for dense+tune"},
}
PRUNED: dict[str, dict[str, Any]] = {
    PEER[1]: {"library": "peer", "technique": "sparsegpt"},
    PLAIN[1]: {"technique": "sparsegpt"},
    "SparseGPT for dense targets": {"technique": "sparsegpt for dense"},
    "SparseGPT, tune": {"technique": "sparsegpt+tune"},
    "SparseGPT for dense targets, tune": {"technique": "sparsegpt for dense+tune"},
    "SparseGPT for dense targets, recovered, tune": {"technique": "sparsegpt for dense recovered+tune"},
}
ROWS = QUANTIZED | PRUNED
Known = dict[str, dict[str, dict[str, Any]]]  # "scheme, row" -> subset -> facts and scores


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
        for scheme in arguments.schemes:
            for row in rows_of(scheme, arguments):
                scores = known.setdefault(f"{scheme}, {row}", {})
                if subset in scores:
                    continue
                out = work / f"out-{os.getpid()}"
                fields = {
                    "library": "ours", "task": "smollm2", "model": str(model), "texts": str(texts), "out": str(out),
                    "rows": arguments.tokens // 256, "batch": arguments.batch, "subset": int(subset), "walk": "auto",
                    "epochs": arguments.epochs,
                }  # fmt: skip
                job = Job(**fields | SCHEMES[scheme] | ROWS[row])
                facts = in_own_process(job, arguments.peer_python)
                scores[subset] = facts | scored(job, out, dense_file(windows, work), arguments.peer_python)
                shutil.rmtree(out)
                notes.write_text(json.dumps(known))
                kl = torch.tensor(scores[subset]["kl"], dtype=torch.float64)
                print(f"{scheme}, subset {subset}, {row}: {facts['cpu_s']:.1f} CPU s, KL {kl.mean():.4f}", flush=True)
    lines = [line for scheme in arguments.schemes for line in [*report(scheme, known, dense, arguments), ""]]
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
    parser.add_argument("--schemes", nargs="+", choices=list(SCHEMES), default=["W4", "W3"])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--tokens", type=int, default=4096, help="of calibration, in rows of 256")
    parser.add_argument("--batch", type=int, default=2, help="rows of a batch, which is one step of tuning")
    parser.add_argument("--epochs", type=int, default=4, help="of tuning")
    parser.add_argument("--subsets", type=int, default=3)
    parser.add_argument("--windows", type=int, default=3, help="evaluation windows of 512 tokens per text")
    parser.add_argument("--resume", action="store_true", help="keep what an interrupted run of this bench has measured")
    machine.add_arguments(parser)
    return parser.parse_args()


def rows_of(scheme: str, arguments: argparse.Namespace) -> list[str]:
    """The rows that were asked for and that fit the scheme."""
    rows = PRUNED if SCHEMES[scheme].keys() & {"sparsity", "mask"} else QUANTIZED
    return [row for row in arguments.rows if row in rows]


def report(scheme: str, known: Known, dense: smollm2.DenseLogits, arguments: argparse.Namespace) -> list[str]:
    """The table of one scheme, as Markdown."""
    texts, bits = smollm2.EVALUATION_TEXTS, SCHEMES[scheme].get("bits")
    head = ["", "bits", "subsets", "KL, nats per token", "over llm-compressor's", "KL - GPTQ's [95 %]"]
    head += [*(f"ppl {text}" for text in texts), "CPU s", "peak MiB"]
    dense_cells = [f"{smollm2.perplexity(part):.2f}" for part in dense.losses.chunk(len(texts))]
    rows = [["dense", "32", "", "0", "", "", *dense_cells, "", ""]]
    by_row = {row: known.get(f"{scheme}, {row}", {}) for row in rows_of(scheme, arguments)}
    peer, plain = (next((by_row[row] for row in by_row if row in names), None) for names in (PEER, PLAIN))
    for row, scores in by_row.items():
        kl, nll = stacked(scores, "kl"), stacked(scores, "nll")
        ratio = f"{kl.mean() / of_same_subsets(peer, scores).mean():.2f}" if peer else ""
        gap = ""
        if plain and row not in PEER + PLAIN:
            difference, draws = kl - of_same_subsets(plain, scores), bootstrap(*kl.shape, len(texts))
            low, high = interval([difference[s][:, w].mean().item() for s, w in draws])
            gap = f"{difference.mean():+.4f} [{low:+.4f}, {high:+.4f}]"
        perplexities = [f"{math.exp(part.mean()):.4g}" for part in nll.chunk(len(texts), dim=1)]
        peak = max(facts["rss_peak_mib"] for facts in scores.values())
        cpu = spread([facts["cpu_s"] for facts in scores.values()])
        stored = next((facts["bits"] for facts in scores.values() if facts.get("bits")), bits and bits + 32 / 64)
        first = [row, f"{stored:.2f}" if stored else "", str(len(scores)), f"{kl.mean():.4f}", ratio, gap]
        rows.append([*first, *perplexities, cpu, f"{peak:.0f}"])
    return [
        f"## {scheme}{', groups of 64' if bits else ''}, {arguments.tokens} calibration tokens, "
        f"{arguments.windows} x 512 tokens of each text",
        "",
        *machine.table(head, rows),
        "",
        f"Batches of {arguments.batch} rows of 256 tokens; tuning: {arguments.epochs} epochs at most, "
        f"lr {SCHEMES[scheme]['lr']:g}, an eighth of the batches held out. Ratios: over the subsets of a row.",
    ]


def of_same_subsets(reference: dict[str, dict[str, Any]], scores: dict[str, dict[str, Any]]) -> torch.Tensor:
    """KL of the reference on the calibration subsets of a row: float64, [subsets, windows]."""
    return stacked({subset: reference[subset] for subset in scores}, "kl")


if __name__ == "__main__":
    main()
