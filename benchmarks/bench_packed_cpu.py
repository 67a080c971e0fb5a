"""Packed Linears and models on a CPU compared with dense ones: CPU seconds of one thread.

    make bench-packed                               # or: python benchmarks/bench_packed_cpu.py --help

Contestants alternate call by call, so that other load slows all of them equally; a figure is the median over rounds
of the ratio to the dense float32 Linear (or model) of the same round. The packed ones are those that
``lightning_compress.load`` takes by default, or with ``dispatch="fastest"``; quantizing the tokens is part of their
time. ``--material`` names the folder of bench-data, for MiniLM and SmolLM2.
"""

import argparse
import copy
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import bench_vision
import machine
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lightning_compress import QuantizationModifier, compress, load, save
from lightning_compress.quant.packed import PackedLinear, multiply_codes

SHAPES = [(576, 576), (1536, 576), (576, 1536), (2048, 2048), (4096, 4096)]  # N, K
TOKENS = [1, 2, 4, 8, 16, 32, 128]
WAYS = ["dense bf16", "W4A16 bf16", "W8A16 bf16", "W8A8 fp32", "W8A8 bf16"]
FASTEST = ["W4A16 bf16", "W8A8 fp32", "W8A8 bf16"]
CONVOLUTIONS = [
    (32, 1, 32, 8),
    (32, 32, 64, 8),
    (1, 64, 64, 32),
    (8, 64, 64, 32),
    (1, 256, 256, 32),
]  # B, in, out, size
MODEL = {
    "vocab_size": 1024, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 6,
    "num_attention_heads": 9, "num_key_value_heads": 3,
}  # fmt: skip
Call = Callable[[], Any]


def seconds(call: Call, repeat: int) -> float:
    start = time.thread_time()
    for _ in range(repeat):
        call()
    return (time.thread_time() - start) / repeat


def paired(calls: Mapping[str, Call], baseline: str, rounds: int, least: float) -> dict[str, dict[str, float]]:
    """Median milliseconds of each, and the median ratio of the baseline's time to its time (above 1: quicker)."""
    repeat = {}
    for name, call in calls.items():
        call()
        repeat[name] = max(1, int(least / max(seconds(call, 1), 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call, repeat[name]))
    return {
        name: {
            "ms": 1e3 * statistics.median(found),
            "speed": statistics.median(b / t for b, t in zip(times[baseline], found, strict=True)),
        }
        for name, found in times.items()
    }


def quantized(N: int, K: int, scheme: str, dtype: torch.dtype) -> nn.Module:
    """A packed Linear; W8A16 by row, W4A16 in groups of 64."""
    torch.manual_seed(0)
    holder = nn.Sequential(nn.Linear(K, N, bias=False, dtype=dtype))
    size = {"W4A16": 64, "W8A16": -1}.get(scheme)
    compress(holder, QuantizationModifier(targets=["Linear"], scheme=scheme, group_size=size))
    return PackedLinear.from_quantized(holder[0])


def layers(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for N, K in SHAPES[: arguments.shapes]:
        dense = nn.Linear(K, N, bias=False)
        modules = {"dense fp32": dense, "dense bf16": nn.Linear(K, N, bias=False, dtype=torch.bfloat16)}
        for way in WAYS[1:]:
            scheme, dtype = way.split()
            modules[way] = quantized(N, K, scheme, torch.float32 if dtype == "fp32" else torch.bfloat16)
            if way in FASTEST:
                modules[f"{way} fastest"] = copy.deepcopy(modules[way])
                modules[f"{way} fastest"].fastest = True
        for M in TOKENS:
            x = torch.randn(1, M, K)
            inputs = {name: x if "fp32" in name else x.bfloat16() for name in modules}
            calls = {name: (lambda f=modules[name], x=inputs[name]: f(x)) for name in modules}
            ways = paired(calls, "dense fp32", arguments.rounds, arguments.least)
            rows.append({"N": N, "K": K, "M": M, "ways": ways})
            print(N, K, M, {name: round(found["speed"], 2) for name, found in rows[-1]["ways"].items()}, flush=True)
    return rows


def convolutions(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """3 x 3 convolutions, static int8: dense, rounded as without packed products, and by ``load``'s two dispatches."""
    rows = []
    for B, inputs, outputs, size in CONVOLUTIONS:
        torch.manual_seed(0)
        dense = nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1)).eval()
        x = torch.randn(B, inputs, size, size)
        rounded = copy.deepcopy(dense)
        compress(rounded, QuantizationModifier(targets=["Conv2d"], scheme="INT8_STATIC"), [x])
        models = {
            "dense": dense,
            "rounded": rounded,
            "packed": copy.deepcopy(rounded),
            "fastest": copy.deepcopy(rounded),
        }
        for name in ("packed", "fastest"):
            multiply_codes(models[name], fastest=name == "fastest")
        calls = {name: (lambda f=model, x=x: f(x)) for name, model in models.items()}
        rows.append(
            {"shape": [B, inputs, outputs, size], "ways": paired(calls, "dense", arguments.rounds, arguments.least)}
        )
    return rows


def networks(material: Path | None) -> Iterator[tuple[str, nn.Module, str, torch.dtype, list[Tensor]]]:
    """Name, dense model, recipe, dtype and the inputs that are timed; speed does not depend on training."""
    yield (
        "digits CNN",
        bench_vision.convolutional(),
        "int8_static",
        torch.float32,
        [torch.randn(B, 1, 8, 8) for B in (32, 1)],
    )
    yield (
        "CNN of 64 to 256 channels",
        larger_cnn(),
        "int8_static",
        torch.float32,
        [torch.randn(B, 3, 32, 32) for B in (8, 1)],
    )
    hidden = [m for i, o in ((30, 128), (128, 128)) for m in (nn.Linear(i, o), nn.BatchNorm1d(o), nn.ReLU())]
    yield (
        "MLP",
        nn.Sequential(*hidden, nn.Linear(128, 2)),
        "w8a8",
        torch.float32,
        [torch.randn(B, 30) for B in (190, 1)],
    )
    yield "ViT", bench_vision.VisionTransformer(), "w8a8", torch.float32, [torch.randn(B, 1, 8, 8) for B in (32, 1)]
    if material is None:
        return
    ids = [torch.randint(1000, (1, tokens)) for tokens in (128, 1)]
    kinds = (
        ("minilm", AutoModel, "w8a8"),
        ("smollm2", AutoModelForCausalLM, "w8a8"),
        ("smollm2", AutoModelForCausalLM, "rtn_w4"),
    )
    for name, kind, recipe in kinds:
        for dtype in (torch.float32, torch.bfloat16):
            if recipe == "w8a8" or dtype is torch.bfloat16:
                yield name, kind.from_pretrained(material / "models" / name, dtype=dtype), recipe, dtype, ids


def larger_cnn() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 64), (64, 64), (64, 128), (128, 128), (128, 256)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    pooled = [*layers[:6], nn.MaxPool2d(2), *layers[6:12], nn.MaxPool2d(2), *layers[12:]]
    return nn.Sequential(*pooled, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))


def whole_models(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for name, dense, recipe, dtype, inputs in networks(arguments.material):
        dense.eval()
        with tempfile.TemporaryDirectory() as root:
            fresh = copy.deepcopy(dense)
            compress(model := copy.deepcopy(dense), recipe, [inputs[0]])
            folder = save(model, Path(root) / "out")
            models = {"dense": dense, "packed": load(folder, copy.deepcopy(fresh))}
            models["fastest"] = load(folder, fresh, dispatch="fastest")
            for x in inputs:
                calls = {way: (lambda f=model, x=x: f(x)) for way, model in models.items()}
                ways = paired(calls, "dense", arguments.rounds, arguments.least)
                label = f"{name}, {recipe}, {str(dtype).removeprefix('torch.')}"
                rows.append({"model": label, "input": list(x.shape), "ways": ways})
                print(label, list(x.shape), {way: round(found["speed"], 2) for way, found in ways.items()}, flush=True)
    return rows


def decode(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Greedy decode of 16 tokens after 8, batch 1, of a small Llama."""
    torch.manual_seed(0)
    ids = torch.randint(1024, (1, 8))
    models: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as root:
        for name, scheme, dtype in (("fp32", "W8A8", torch.float32), ("bf16", "W4A16", torch.bfloat16)):
            model: Any = LlamaForCausalLM(LlamaConfig(**MODEL)).to(dtype).eval()
            models[f"dense {name}"] = LlamaForCausalLM(LlamaConfig(**MODEL)).to(dtype).eval()
            size = 64 if scheme == "W4A16" else None
            compress(model, QuantizationModifier(scheme=scheme, group_size=size, ignore=["lm_head"]), [ids])
            folder = save(model, Path(root) / scheme)
            models[f"{scheme} {name}, packed=False"] = load(folder, packed=False)
            models[f"{scheme} {name}, fuse=False"] = load(folder, fuse=False)
            models[f"{scheme} {name}"] = load(folder)
    options = {"do_sample": False, "max_new_tokens": 16, "min_new_tokens": 16, "pad_token_id": 0}
    calls = {name: (lambda model=model: model.generate(ids, **options)) for name, model in models.items()}
    return paired(calls, "dense fp32", arguments.rounds, 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--least", type=float, default=0.01, help="seconds of each timed burst")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="the first of the shapes only")
    parser.add_argument("--material", type=Path)
    parser.add_argument("--machine", default="")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with torch.no_grad():
        rows, whole = layers(arguments), decode(arguments)
        convolved, models = convolutions(arguments), whole_models(arguments)
    ways = [*WAYS, *(f"{way} fastest" for way in FASTEST)]
    lines = [
        "Speed beside the dense float32 Linear: its CPU time over that of the way, median of "
        f"{arguments.rounds} rounds; one thread, torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}. "
        "W4A16 in groups of 64, W8A16 and W8A8 by row; tokens are quantized within the time of W8A8.",
        "",
        *machine.table(
            ["N x K", "M", "dense fp32, ms", *ways],
            [
                [f"{row['N']} x {row['K']}", row["M"], f"{row['ways']['dense fp32']['ms']:.3f}",
                 *(f"{row['ways'][way]['speed']:.2f}" for way in ways)]
                for row in rows
            ],
        ),
        "",
        f"Greedy decode of 16 tokens after 8 by a Llama of {MODEL['num_hidden_layers']} layers, hidden size 576 "
        "(`generate`, batch 1):",
        "",
        *machine.table(
            ["model", "ms", "speed beside dense fp32"],
            [[name, f"{found['ms']:.0f}", f"{found['speed']:.2f}"] for name, found in whole.items()],
        ),
        "",
        "Static int8 convolutions of 3 x 3, and whole models, beside the dense ones of their dtype (above 1: faster):",
        "",
        *machine.table(
            ["batch, channels in and out, size", "dense, ms", "rounded inputs, dense", "packed", "fastest"],
            [[row["shape"], f"{row['ways']['dense']['ms']:.3f}",
              *(f"{row['ways'][way]['speed']:.2f}" for way in ("rounded", "packed", "fastest"))] for row in convolved],
        ),
        "",
        *machine.table(
            ["model", "input", "dense, ms", "packed", "fastest"],
            [[row["model"], row["input"], f"{row['ways']['dense']['ms']:.2f}",
              *(f"{row['ways'][way]['speed']:.2f}" for way in ("packed", "fastest"))] for row in models],
        ),
    ]  # fmt: skip
    facts = {"rounds": arguments.rounds, "layers": rows, "decode": whole, "convolutions": convolved, "models": models}
    print(machine.write("packed-cpu", "Packed weights on a CPU", lines, facts, arguments.machine))


if __name__ == "__main__":
    main()
