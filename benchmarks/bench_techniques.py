"""Every technique against llm-compressor's: CPU seconds and accuracy on equal calibration data.

    make bench-techniques                           # or: python benchmarks/bench_techniques.py --help

SmolLM2-135M, fp32, one thread; 16 rows x 256 tokens for all rows of the table, three disjoint calibration subsets.
Both libraries use their own defaults unless the row has other arguments. Every run is a separate process
(measured_run.py), the two libraries alternate, and ratios of CPU seconds are computed within a row and subset. Exported
folders are reloaded by plain transformers of the environment that wrote them, in a separate process (scored.py). The
only exception is QuIP of this package, whose online rotation transformers would not apply: transformers refuses such a
folder with a message, so `load` of this package reads it.

Divergence and perplexity as in bench_accuracy.py.
"""

import argparse
import json
import math
import os
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import machine
import smollm2
import torch
from bench_accuracy import bootstrap, cached_dense_logits, dense_file, interval, stacked
from measured_run import Job, in_own_process, python_of, result_of

ROWS: dict[str, dict[str, Any]] = {  # row of the table -> fields of Job
    "RTN W4 g64": {"technique": "rtn"},
    "RTN W4 g64, asymmetric": {"technique": "rtn", "symmetric": False},
    "GPTQ W4 g64": {"technique": "gptq"},
    "AWQ W4 g64, asymmetric": {"technique": "awq", "symmetric": False},
    "SmoothQuant + GPTQ W8A8": {"technique": "smoothquant+gptq w8a8"},
    "SparseGPT 50 %": {"technique": "sparsegpt"},
    "SparseGPT 2:4": {"technique": "sparsegpt", "mask": "2:4"},
    "Wanda 50 %": {"technique": "wanda"},
    "Wanda 2:4": {"technique": "wanda", "mask": "2:4"},
    "SpinQuant R1, R2 + RTN W4 g64": {"technique": "spinquant+rtn"},
    "QuIP + RTN W4 g64": {"technique": "quip+rtn"},
}
LIBRARIES = ("peer", "ours")
Known = dict[str, dict[str, dict[str, Any]]]  # row -> library -> subset -> facts and scores


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    model, texts = arguments.material / "models/smollm2", arguments.material / "texts"
    tokenizer = smollm2.load_tokenizer(model)
    names = smollm2.EVALUATION_TEXTS
    windows = smollm2.windows_of_all(tokenizer, texts, arguments.windows)
    dense = cached_dense_logits(model, windows, arguments.material)
    notes = arguments.material / "techniques.json"
    known: Known = json.loads(notes.read_text()) if arguments.resume and notes.exists() else {}
    for subset in map(str, range(arguments.subsets)):
        for number, row in enumerate(arguments.rows):
            for library in arguments.libraries[:: -1 if (number + int(subset)) % 2 else 1]:
                scores = known.setdefault(row, {}).setdefault(library, {})
                if subset in scores:
                    continue
                out = arguments.material / f"out-{os.getpid()}"
                job = Job("ours", "smollm2", str(model), str(texts), str(out), subset=int(subset), walk="auto")
                job = replace(job, library=library, **ROWS[row])
                facts = in_own_process(job, arguments.peer_python)
                facts["bytes"] = (out / "model.safetensors").stat().st_size
                facts |= scored(job, out, dense_file(windows, arguments.material), arguments.peer_python)
                shutil.rmtree(out)
                scores[subset] = facts
                notes.write_text(json.dumps(known))
                kl, nll = (torch.tensor(facts[field], dtype=torch.float64) for field in ("kl", "nll"))
                print(f"{row}, subset {subset}, {library}: {facts['cpu_s']:.1f} CPU s, KL {kl.mean():.4f}, "
                      f"perplexity {' '.join(f'{math.exp(part.mean()):.2f}' for part in nll.chunk(len(names)))}, "
                      f"load {facts['load_1min']:.1f}", flush=True)  # fmt: skip
    lines = report(known, dense, arguments)
    print("\n".join(lines))
    if not arguments.dry:
        title = "All techniques: this package and llm-compressor 0.14.0.1, equal calibration, one thread, fp32"
        facts = {"dense_nll": dense.losses.tolist(), "scores": {row: known[row] for row in arguments.rows}}
        print("written:", machine.write("techniques", title, lines, facts, arguments.machine))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--material", type=Path, default=Path("benchmarks/work"), help="what `make bench-data` filled")
    parser.add_argument("--peer-python", default=".venv-peer/bin/python", help="python with llmcompressor")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))
    parser.add_argument("--subsets", type=int, default=3)
    parser.add_argument("--windows", type=int, default=3, help="evaluation windows of 512 tokens per text")
    parser.add_argument("--resume", action="store_true", help="keep what an interrupted run of this bench has measured")
    machine.add_arguments(parser)
    return parser.parse_args()


def scored(job: Job, folder: Path, dense: Path, peer_python: str) -> dict[str, Any]:
    """KL and loss per window of the exported model, by plain transformers where it can.

    This package reads 4-bit floats of both libraries: compressed-tensors 0.19 computes with them in bfloat16 only.
    """
    by_package = bool(job.scheme) or (job.technique.startswith("quip") and job.library == "ours")
    python = python_of(replace(job, library="ours") if by_package else job, peer_python)
    command = [python, str(Path(__file__).with_name("scored.py")), str(folder), str(dense)]
    if by_package:
        command.append("--package")
    return result_of(command, f"the evaluation of {job.technique} of {job.library}")


def report(known: Known, dense: smollm2.DenseLogits, arguments: argparse.Namespace) -> list[str]:
    """The table, as Markdown: a row for each technique and library."""
    texts = smollm2.EVALUATION_TEXTS
    head = ["", "library", "CPU s", "ratio", "with writing, CPU s", *(f"ppl {text}" for text in texts)]
    head += ["NLL - peer's [95 %]", "KL, nats per token", "MB", "peak MiB"]
    megabytes = (arguments.material / "models/smollm2/model.safetensors").stat().st_size / 1e6
    perplexities = [f"{smollm2.perplexity(part):.2f}" for part in dense.losses.chunk(len(texts))]
    rows = [["dense", "", "", "", "", *perplexities, "", "0", f"{megabytes:.0f}", ""]]
    for row in arguments.rows:
        for library in LIBRARIES:
            scores = known[row].get(library)
            if not scores:
                continue
            peer = known[row].get("peer") if library == "ours" else None
            kl, nll = stacked(scores, "kl"), stacked(scores, "nll")
            cpu = [scores[subset]["cpu_s"] for subset in sorted(scores)]
            ratio = gap = ""
            if peer and peer.keys() == scores.keys():
                ratio = spread([own / peer[s]["cpu_s"] for own, s in zip(cpu, sorted(scores), strict=True)])
                draws = bootstrap(*kl.shape, len(texts))
                difference = nll - stacked(peer, "nll")
                low, high = interval([difference[s][:, w].mean().item() for s, w in draws])
                gap = f"{difference.mean():+.4f} [{low:+.4f}, {high:+.4f}]"
            perplexities = [f"{math.exp(part.mean()):.4g}" for part in nll.chunk(len(texts), dim=1)]
            rows.append([
                row, {"peer": "llm-compressor", "ours": "this package"}[library], spread(cpu), ratio,
                spread([own + scores[s]["save_cpu_s"] for own, s in zip(cpu, sorted(scores), strict=True)]),
                *perplexities, gap,
                f"{kl.mean():.4f}", f"{scores['0']['bytes'] / 1e6:.0f}",
                f"{max(facts['rss_peak_mib'] for facts in scores.values()):.0f}",
            ])  # fmt: skip
    loads = [facts["load_1min"] for row in arguments.rows for of in known[row].values() for facts in of.values()]
    return [
        f"## SmolLM2-135M, 16 x 256 calibration tokens, {arguments.subsets} subsets, {arguments.windows} windows of "
        "512 tokens per text",
        "",
        *machine.table(head, rows),
        "",
        "CPU seconds of the compression alone: median and (range) over the subsets; perplexity and KL of the reloaded "
        "export, means over subsets. KL over the dense model's top 512 classes and the rest. Load average while "
        f"measuring {min(loads):.1f} to {max(loads):.1f}. SmolLM2's linears come from a 4-bit grid (groups of 32), so "
        "rotations lose there what other models would not: see bench_weights.py for weights off the grid.",
    ]


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
