"""Accuracy against llm-compressor: divergence from the dense model, and perplexity, at equal format and equal tokens.

    make bench-accuracy                             # or: python benchmarks/bench_accuracy.py --help

SmolLM2-135M, 16 rows x 256 tokens, symmetric groups of 64, static order of columns, 4 and 3 bits, three disjoint
calibration subsets. Every contestant exports a folder, which plain transformers reloads in this process.

The measure is KL(dense || compressed) over the dense model's 512 likeliest classes and the rest as one class, in nats
per token: it is more sensitive than perplexity, which uses one class. Intervals: bootstrap, 95 %; windows within each
text and subsets are resampled, with the same draw for both sides of a ratio.
"""

import argparse
import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import machine
import smollm2
import torch
from measured_run import Job, in_own_process
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

PEER = "llm-compressor"
CONTESTANTS = {  # name -> fields of Job that differ
    PEER: {"library": "peer"},
    "minmax, two-pass": {"walk": "two_pass", "scale_search": "minmax"},
    "hessian, two-pass": {"walk": "two_pass", "scale_search": "hessian"},
    "hessian, one-pass": {"walk": "one_pass", "scale_search": "hessian"},
}
Scores = dict[str, dict[str, list[float]]]  # subset -> {"kl": per window, "nll": per window}


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    model, texts = arguments.material / "models/smollm2", arguments.material / "texts"
    tokenizer = smollm2.load_tokenizer(model)
    windows = smollm2.windows_of_all(tokenizer, texts, arguments.windows)
    dense = cached_dense_logits(model, windows, arguments.material)
    notes = arguments.material / "accuracy.json"
    known: dict[str, Scores] = json.loads(notes.read_text()) if notes.exists() else {}
    for bits in arguments.bits:
        for name in arguments.contestants:
            scores: Scores = {}
            for subset in map(str, range(arguments.subsets)):
                old = known.get(f"W{bits} {name}", {}).get(subset)
                if old and name in arguments.reuse and len(old["kl"]) == len(windows):
                    scores[subset] = old
                    continue
                out = arguments.material / f"out-{os.getpid()}"
                job = Job("ours", "smollm2", str(model), str(texts), str(out), bits=bits, subset=int(subset))
                in_own_process(replace(job, **CONTESTANTS[name]), arguments.peer_python)
                kl, nll = smollm2.divergence(smollm2.load(out), windows, dense)
                shutil.rmtree(out)
                scores[subset] = {"kl": kl.tolist(), "nll": nll.tolist()}
                print(f"W{bits}, {name}, subset {subset}: KL {kl.mean():.4f}, NLL {nll.mean():.4f} "
                      f"(dense {dense.losses.mean():.4f})", flush=True)  # fmt: skip
            known[f"W{bits} {name}"] = scores
            notes.write_text(json.dumps(known))
    lines = [line for bits in arguments.bits for line in [*report(bits, known, dense.losses, arguments), ""]]
    print("\n".join(lines))
    if not arguments.dry:
        kept = {key: value for key, value in known.items() if int(key[1]) in arguments.bits}
        title = "Accuracy: this package and llm-compressor 0.14.0.1 at equal format and tokens, SmolLM2-135M"
        facts = {"dense_nll": dense.losses.tolist(), "scores": kept}
        print("written:", machine.write("accuracy", title, lines, facts, arguments.machine))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--material", type=Path, default=Path("benchmarks/work"), help="what `make bench-data` filled")
    parser.add_argument("--peer-python", default=".venv-peer/bin/python", help="python with llmcompressor")
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3])
    parser.add_argument("--contestants", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    parser.add_argument("--subsets", type=int, default=3)
    parser.add_argument("--windows", type=int, default=6, help="evaluation windows of 512 tokens per text")
    parser.add_argument("--reuse", nargs="*", default=[], help="contestants whose scores of an earlier run are taken")
    machine.add_arguments(parser)
    return parser.parse_args()


def cached_dense_logits(model: Path, windows: Tensor, material: Path) -> smollm2.DenseLogits:
    """The dense model's predictions, from disk if the same windows were run before."""
    file = dense_file(windows, material)
    if file.exists():
        with safe_open(file, "pt") as stored:
            if torch.equal(stored.get_tensor("windows"), windows):
                return smollm2.DenseLogits(
                    *(stored.get_tensor(field) for field in ("classes", "log_p", "rest", "losses"))
                )
    dense = smollm2.dense_logits(smollm2.load(model), windows)
    save_file({"windows": windows.contiguous(), **vars(dense)}, file)
    return dense


def dense_file(windows: Tensor, material: Path) -> Path:
    """File of the dense model's predictions for this number of windows."""
    return material / f"dense_{len(windows)}x{windows.shape[1]}.safetensors"


def report(bits: int, known: dict[str, Scores], dense: Tensor, arguments: argparse.Namespace) -> list[str]:
    """The table of one width, as Markdown."""
    texts = smollm2.EVALUATION_TEXTS
    perplexity = [f"ppl {text}" for text in texts]
    head = ["", "KL, nats per token", f"ratio to {PEER} [95 %]", *perplexity, "NLL - peer's [95 %]"]
    rows = [["dense", "0", "", *(f"{smollm2.perplexity(part):.3f}" for part in dense.chunk(len(texts))), ""]]
    peer = known.get(f"W{bits} {PEER}")
    for name in arguments.contestants:
        kl, nll = (stacked(known[f"W{bits} {name}"], field) for field in ("kl", "nll"))
        by_subset = kl.mean(1)
        versus = ["", ""]
        if peer and name != PEER:
            draws = bootstrap(*kl.shape, len(texts))
            ratio = interval([(kl[s][:, w].mean() / stacked(peer, "kl")[s][:, w].mean()).item() for s, w in draws])
            gap = interval([(nll - stacked(peer, "nll"))[s][:, w].mean().item() for s, w in draws])
            versus = [
                f"{kl.mean() / stacked(peer, 'kl').mean():.3f} [{ratio[0]:.3f}, {ratio[1]:.3f}]",
                f"{(nll - stacked(peer, 'nll')).mean():+.4f} [{gap[0]:+.4f}, {gap[1]:+.4f}]",
            ]
        perplexities = [f"{math.exp(part.mean()):.3f}" for part in nll.chunk(len(texts), dim=1)]
        kl_text = f"{kl.mean():.4f} ({by_subset.min():.4f} to {by_subset.max():.4f})"
        rows.append([name, kl_text, versus[0], *perplexities, versus[1]])
    return [
        f"## W{bits}, symmetric groups of 64, 16 x 256 calibration tokens, {arguments.subsets} subsets",
        "",
        *machine.table(head, rows),
        "",
        f"Mean over {arguments.subsets} calibration subsets (in brackets: lowest to highest subset) and "
        f"{arguments.windows} windows of 512 tokens per text. KL over the dense model's top 512 classes and the rest.",
    ]


def stacked(scores: Scores, field: str) -> Tensor:
    """Float64, [subsets, windows]."""
    return torch.tensor([scores[subset][field] for subset in sorted(scores)], dtype=torch.float64)


def bootstrap(subsets: int, windows: int, texts: int, draws: int = 4000) -> list[tuple[Tensor, Tensor]]:
    """Index sets (subsets, windows), drawn with replacement; windows within each text."""
    generator = torch.Generator().manual_seed(0)
    each = windows // texts
    shift = torch.arange(texts)[:, None] * each
    return [
        (
            torch.randint(subsets, (subsets,), generator=generator),
            (torch.randint(each, (texts, each), generator=generator) + shift).flatten(),
        )
        for _ in range(draws)
    ]


def interval(values: list[float]) -> tuple[float, float]:
    low, high = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return low.item(), high.item()


if __name__ == "__main__":
    main()
