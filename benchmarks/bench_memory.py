"""Peak memory of calibration and of loading, on a synthetic Llama of 11 blocks of 49 MiB in float32.

    make bench-memory                               # or: python benchmarks/bench_memory.py --help

Each row is a process of its own, one thread: resident memory above that before the call, at its peak and afterwards.
"""

import argparse
import gc
import json
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import torch
from measured_run import measured, resident, result_of
from torch import nn

SIZES = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "vocab_size": 4096}
ROWS: dict[str, dict[str, Any]] = {
    "GPTQ W4A16, walk=one_pass": {"do": "walk", "walk": "one_pass"},
    "GPTQ W4A16, walk=two_pass": {"do": "walk", "walk": "two_pass"},
    "GPTQ W4A16, memory_limit=300MB": {"do": "walk", "memory_limit": "300MB"},
    "load of the quantized folder": {"do": "load"},
    "load, packed=False": {"do": "load", "packed": False},
    "load, packed=True": {"do": "load", "packed": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--material", type=Path, default=Path("benchmarks/work"), help="folder for the models")
    parser.add_argument("--blocks", type=int, default=11)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    machine.add_arguments(parser)
    arguments = parser.parse_args()
    folder = arguments.material / f"memory-{arguments.blocks}"
    models = call({"do": "make", "folder": str(folder), "blocks": arguments.blocks})
    facts = {name: call({"folder": str(folder), **ROWS[name]}) for name in arguments.rows}
    shutil.rmtree(folder)
    rows = [[name, *(f"{f[key]:+.0f}" for key in ("peak", "after")), f"{f['cpu_s']:.1f}"] for name, f in facts.items()]
    lines = [
        f"The dense model has {models['dense']:.0f} MiB, its quantized folder {models['quantized']:.0f} MiB; "
        f"calibration on 8 x 512 tokens.",
        "",
        *machine.table(["", "peak, MiB", "afterwards, MiB", "CPU s"], rows),
    ]
    print("\n".join(lines))
    if not arguments.dry:
        title = "Resident memory above that before the call"
        print("written:", machine.write("memory", title, lines, {**models, **facts}, arguments.machine))


def call(job: dict[str, Any]) -> dict[str, Any]:
    """Run a job in a process of its own."""
    return result_of([sys.executable, __file__, json.dumps(job)], str(job))


def run(do: str, folder: str, **options: Any) -> dict[str, Any]:
    """A job: ``make`` the models, ``walk`` over the dense one, or ``load`` the quantized one."""
    from lightning_compress import compress, load

    torch.manual_seed(0)
    if do == "make":
        return make(Path(folder), options["blocks"])
    call: Callable[[], Any] = lambda: load(Path(folder) / "quantized", **options)  # noqa: E731
    if do == "walk":
        model = dense(Path(folder))
        batches = [{"input_ids": torch.randint(0, SIZES["vocab_size"], (1, 512))} for _ in range(8)]
        call = lambda: compress(model, "gptq_w4", batches, **options)  # noqa: E731
    gc.collect()
    with measured() as facts:
        result = call()
    gc.collect()
    after = resident("VmRSS") - facts["rss_before_mib"]
    del result
    return {"peak": facts["rss_peak_inside_mib"] - facts["rss_before_mib"], "after": after, "cpu_s": facts["cpu_s"]}


def make(folder: Path, blocks: int) -> dict[str, float]:
    """Write a dense model and its quantized export; their sizes in MiB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from lightning_compress import compress, save

    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=blocks, tie_word_embeddings=False, **SIZES))
    model.save_pretrained(folder / "dense")
    compress(model, "rtn_w4")
    save(model, folder / "quantized", overwrite=True)
    sizes = {
        name: sum(f.stat().st_size for f in (folder / name).glob("*.safetensors")) for name in ("dense", "quantized")
    }
    return {name: size / 2**20 for name, size in sizes.items()}


def dense(folder: Path) -> nn.Module:
    """The dense model in memory of its own: mapped weights would become resident only as they change."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder / "dense").eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1].startswith("{"):
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        print("RESULT " + json.dumps(run(**json.loads(sys.argv[1]))))
    else:
        main()
