"""A model that is four times larger than the memory limit, compressed from folder to folder, beside a run in memory.

    make bench-stream                               # or: python benchmarks/bench_stream.py --help

A Llama with random float32 weights (hidden size 1024, 49 MiB a block) with 12 and with 24 blocks; RTN W4A16 and GPTQ
W4A16 with one batch of 512 tokens; in memory the smaller model only. Every run is a separate process with one thread.
Peak: anonymous memory above that after all imports and a compression of a tiny model, sampled every 2 ms. Limit:
RLIMIT_DATA, above what the process has by then, a quarter of the larger model. CPU seconds: reading, compressing and
writing.
"""

import argparse
import json
import os
import resource
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import machine
import torch
from measured_run import result_of
from torch import Tensor

VOCABULARY, TOKENS = 2048, 512
RECIPES = {"RTN": "rtn_w4", "GPTQ": "gptq_w4"}
GOALS = {"RTN": 110, "GPTQ": 230}  # MB at the peak


def main() -> None:
    arguments = parse_arguments()
    if arguments.child:
        print("RESULT", json.dumps(run(**json.loads(arguments.child))))
        return
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        work = Path(name)
        for blocks in arguments.blocks:
            write_llama(work / f"dense-{blocks}", blocks, arguments.hidden)
        limit = weights_of(work / f"dense-{max(arguments.blocks)}") // 4
        for blocks in arguments.blocks:
            for title in RECIPES:
                rows.append(compare(title, blocks, work, limit, beside=blocks == min(arguments.blocks)))
                report(rows, arguments.hidden)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[12, 24])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--folder", help="where the models are written; by default the system's temporary folder")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def write_llama(folder: Path, blocks: int, hidden: int) -> None:
    """A model with random weights, in files of about one block."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=blocks, num_attention_heads=8,
        num_key_value_heads=8, vocab_size=VOCABULARY, max_position_embeddings=TOKENS, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="55MB")


def weights_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def compare(title: str, blocks: int, work: Path, limit: int, beside: bool) -> dict[str, Any]:
    """A recipe on one model, from folder to folder and, with ``beside``, in memory."""
    dense, facts = work / f"dense-{blocks}", {}
    for kind in ("streamed", "in memory")[: 1 + beside]:
        job = {"kind": kind, "recipe": RECIPES[title], "dense": str(dense), "out": str(work / kind), "limit": limit}
        shutil.rmtree(work / kind, ignore_errors=True)
        command = [sys.executable, __file__, "--child", json.dumps(job)]
        facts[kind] = result_of(command, f"{title} {kind}")
    equal = different_tensors(work / "streamed", work / "in memory") == 0 if beside else None
    return {
        "recipe": title,
        "blocks": blocks,
        "model_mb": weights_of(dense) / 1e6,
        "limit_mb": limit / 1e6,
        "equal": equal,
        **facts,
    }


def different_tensors(one: Path, other: Path) -> int:
    """Tensors that are not equal bit for bit, or that only one of the folders has."""
    from lightning_compress.export.tensor_file import TensorFolder

    ours, theirs = TensorFolder(one), TensorFolder(other)
    common = ours.files.keys() & theirs.files.keys()
    differing = [n for n in common if not same_bits(ours.read(n), theirs.read(n))]
    return len(differing) + len(ours.files.keys() ^ theirs.files.keys())


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (one, other)))


def run(kind: str, recipe: str, dense: str, out: str, limit: int) -> dict[str, Any]:
    """One compression in this process."""
    from transformers import AutoModelForCausalLM

    from lightning_compress import compress, compress_folder, save
    from lightning_compress.export.tensor_file import TensorFolder
    from lightning_compress.oneshot import modifiers_of
    from lightning_compress.recipe import dump_recipe

    torch.set_num_threads(1)
    batch = {"input_ids": torch.randint(VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(1))}
    batches = [batch] if recipe == "gptq_w4" else None

    def in_memory(source: str, target: str) -> None:
        model = AutoModelForCausalLM.from_pretrained(source)
        compress(model, recipe, batches)
        save(model, target, recipe=dump_recipe(modifiers_of(recipe)))

    def streamed(source: str, target: str) -> None:
        compress_folder(source, target, recipe, batches)

    work = streamed if kind == "streamed" else in_memory
    with tempfile.TemporaryDirectory() as tiny:
        write_llama(Path(tiny) / "dense", 2, 128)
        work(f"{tiny}/dense", f"{tiny}/out")
    reads: Counter[str] = Counter()
    read = TensorFolder.read

    def counted(self: TensorFolder, name: str) -> Tensor:
        reads[name] += str(self.files[name].path.parent) == dense
        return read(self, name)

    TensorFolder.read = counted  # type: ignore[method-assign]
    if kind == "streamed":
        most = status("VmData") + limit
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    with Peak() as peak:
        began = time.process_time()
        work(dense, out)
        seconds = time.process_time() - began
    return {"cpu_s": seconds, "peak_mb": peak.rise / 1e6, "reads": max(reads.values(), default=0)}


class Peak:
    """The largest anonymous memory inside of a ``with`` block, above that at its start."""

    rise = 0

    def __enter__(self) -> "Peak":
        self._start, self._ended = status("RssAnon"), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.002):
            self.rise = max(self.rise, status("RssAnon") - self._start)


def status(field: str) -> int:
    """A size in /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def report(rows: list[dict[str, Any]], hidden: int) -> None:
    """Write the table to benchmarks/results."""
    lines = [
        f"One batch of {TOKENS} tokens, hidden size {hidden}, one thread. MB = 10^6 bytes.",
        "",
        "| | blocks | weights, MB | limit, MB | peak, MB | goal | peak in memory, MB | CPU s | in memory | ratio "
        "| reads of a block | tensors equal |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ours, other = row["streamed"], row.get("in memory")
        beside = ["", "", "", ""]
        if other is not None:
            ratio = ours["cpu_s"] / other["cpu_s"]
            beside = [
                f"{other['peak_mb']:.0f}",
                f"{other['cpu_s']:.1f}",
                f"{ratio:.2f}",
                "yes" if row["equal"] else "NO",
            ]
        peak, seconds, ratio_text, equal = beside
        cells = [
            row["recipe"], row["blocks"], f"{row['model_mb']:.0f}", f"{row['limit_mb']:.0f}", f"{ours['peak_mb']:.0f}",
            GOALS[row["recipe"]], peak, f"{ours['cpu_s']:.1f}", seconds, ratio_text, ours["reads"], equal,
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    print("\n".join(lines))
    print(machine.write("stream", "A model larger than memory", lines, {"rows": rows}))


if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")
    main()
