"""Calibration against llm-compressor: ratios of CPU seconds, peak memory, and accuracy.

    make bench-calibration                          # or: python benchmarks/bench_calibration.py --help

GPTQ on two real models, equal scheme, equal tokens, fp32, one thread:

- SmolLM2-135M: 16 rows x 256 tokens, W4 in symmetric groups of 64, static order of columns;
- MiniLM-L6: 32 rows x 128 tokens, W4A16 (symmetric groups of 128).

Every run is a separate process (measured_run.py), and the runs alternate: a round has each contestant once, every other
round is in reverse order, and ratios are computed within a round, so that other load affects both sides equally. CPU
seconds are those of compression only, without import, loading and saving. The exported folders are evaluated
afterwards, in this process, which never imports the package, by plain transformers.
"""

import argparse
import hashlib
import os
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import machine
import minilm
import smollm2
import torch
from measured_run import Job, in_own_process

PEER = "llm-compressor"
CONTESTANTS = {  # name -> fields of Job that differ
    PEER: {"library": "peer"},
    "two-pass, minmax": {"walk": "two_pass", "scale_search": "minmax"},
    "two-pass, hessian": {"walk": "two_pass", "scale_search": "hessian"},
    "one-pass, minmax": {"walk": "one_pass", "scale_search": "minmax"},
    "one-pass, hessian": {"walk": "one_pass", "scale_search": "hessian"},
    "one forward pass": {"library": "forward"},
}


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    texts = arguments.material / "texts"
    jobs = {
        "smollm2": Job("ours", "smollm2", str(arguments.material / "models/smollm2"), str(texts)),
        "minilm": Job(
            "ours", "minilm", str(arguments.material / "models/minilm"), str(texts),
            rows=32, length=128, batch=8, group=128,
        ),
    }  # fmt: skip
    lines: list[str] = []
    facts: dict[str, Any] = {}
    for task in arguments.tasks:
        runs = measure(jobs[task], arguments)
        quality = evaluate(task, runs, arguments)
        lines += [*report(task, jobs[task], runs, quality), ""]
        facts[task] = {"runs": runs, "quality": quality}
        print("\n".join(lines), flush=True)
    shutil.rmtree(arguments.material / f"out-{os.getpid()}", ignore_errors=True)
    if not arguments.dry:
        title = "Calibration: this package and llm-compressor 0.14.0.1, alternately, one thread, fp32"
        print("written:", machine.write("calibration", title, lines, facts, arguments.machine))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--material", type=Path, default=Path("benchmarks/work"), help="what `make bench-data` filled")
    parser.add_argument("--peer-python", default=".venv-peer/bin/python", help="python with llmcompressor")
    parser.add_argument("--tasks", nargs="+", choices=["smollm2", "minilm"], default=["smollm2", "minilm"])
    parser.add_argument("--contestants", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=6, help="evaluation windows of 512 tokens per text")
    machine.add_arguments(parser)
    arguments = parser.parse_args()
    if PEER not in arguments.contestants:
        arguments.dry = True
    return arguments


def measure(job: Job, arguments: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Name -> one row of results per round. Exports of the last round are kept until they are evaluated."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.contestants}
    for number in range(arguments.rounds):
        for name in arguments.contestants[:: -1 if number % 2 else 1]:
            out = folder(job.task, name, arguments)
            facts = in_own_process(replace(job, out=str(out), **CONTESTANTS[name]), arguments.peer_python)
            if (weights := out / "model.safetensors").exists():
                facts["sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()[:16]
            runs[name].append(facts)
            print(f"{job.task}, round {number + 1}, {name}: {facts['cpu_s']:.1f} CPU s, "
                  f"peak {facts['rss_peak_mib']:.0f} MiB, load {facts['load_1min']:.1f}", flush=True)  # fmt: skip
    return runs


def folder(task: str, name: str, arguments: argparse.Namespace) -> Path:
    """Export folder of a contestant; two benchmarks may run at the same time on the same material."""
    return Path(arguments.material) / f"out-{os.getpid()}" / f"{task}-{name.replace(', ', '-').replace(' ', '-')}"


def evaluate(task: str, runs: dict[str, list[dict[str, Any]]], arguments: argparse.Namespace) -> dict[str, Any]:
    """Name -> metrics of the reloaded export; ``dense``: those of the dense model."""
    folders = {"dense": arguments.material / "models" / task}
    folders |= {name: path for name in runs if (path := folder(task, name, arguments)).exists()}
    texts = arguments.material / "texts"
    tokenizer = smollm2.load_tokenizer(folders["dense"])
    if task == "minilm":
        rows = minilm.evaluation_rows(tokenizer, texts, rows=30, length=128)
        dense = minilm.embeddings(minilm.load(folders["dense"]), rows)
        cosines = {name: (minilm.embeddings(minilm.load(path), rows) * dense).sum(-1) for name, path in folders.items()}
        return {name: {"cosine": cosine.mean().item()} for name, cosine in cosines.items()}
    windows = {t: smollm2.evaluation_windows(tokenizer, texts, t, arguments.windows) for t in smollm2.EVALUATION_TEXTS}
    quality = {}
    for name, path in folders.items():
        model = smollm2.load(path)
        quality[name] = {t: smollm2.perplexity(smollm2.window_losses(model, x)) for t, x in windows.items()}
    return quality


def report(task: str, job: Job, runs: dict[str, list[dict[str, Any]]], quality: dict[str, Any]) -> list[str]:
    """The table of one model, as Markdown."""
    columns = list(quality["dense"])
    head = ["", "CPU s", f"ratio to {PEER}", "peak MiB", "ratio", "peak while compressing, MiB", *columns]
    rows = [["dense", "", "", "", "", "", *(f"{quality['dense'][c]:.4g}" for c in columns)]]
    for name, facts in runs.items():
        ratio = relative(runs, name, "cpu_s") if PEER in runs else None
        memory = relative(runs, name, "rss_peak_mib") if PEER in runs else None
        scores = [f"{quality[name][c]:.4f}" for c in columns] if name in quality else [""] * len(columns)
        rows.append([
            name,
            spread([f["cpu_s"] for f in facts], 1),
            spread(ratio, 2) if ratio else "",
            f"{statistics.median(f['rss_peak_mib'] for f in facts):.0f}",
            f"{statistics.median(memory):.2f}" if memory else "",
            f"{statistics.median(f['rss_peak_inside_mib'] or float('nan') for f in facts):.0f}",
            *scores,
        ])  # fmt: skip
    hashes = {name: {f.get("sha256") for f in facts} - {None} for name, facts in runs.items()}
    equal = [name for name, found in hashes.items() if len(found) == 1]
    different = [name for name, found in hashes.items() if len(found) > 1]
    rounds = len(next(iter(runs.values())))
    loads = [f["load_1min"] for facts in runs.values() for f in facts]
    what = {"smollm2": "SmolLM2-135M", "minilm": "MiniLM-L6"}[task]
    tell = {
        "smollm2": "Perplexity of the exported folder, reloaded by plain transformers, per text.",
        "minilm": "Mean cosine of the exported folder's embeddings with the dense model's, 60 held-out passages.",
    }[task]
    return [
        f"## {what}: {job.rows} x {job.length} tokens, W{job.bits} symmetric, groups of {job.group}, static order",
        "",
        *machine.table(head, rows),
        "",
        f"Median and (range) of {rounds} rounds; ratios are taken inside a round. {tell} Load average while measuring "
        f"{min(loads):.1f} to {max(loads):.1f}. model.safetensors byte for byte equal in all rounds: "
        f"{', '.join(equal) or 'none'}" + (f"; different: {', '.join(different)}." if different else "."),
    ]


def relative(runs: dict[str, list[dict[str, Any]]], name: str, field: str) -> list[float]:
    return [ours[field] / peer[field] for ours, peer in zip(runs[name], runs[PEER], strict=True)]


def spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


if __name__ == "__main__":
    main()
