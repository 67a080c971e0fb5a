"""Compare what we export with what llm-compressor writes for the same model and recipe, key by key.

    python benchmarks/compare_export.py PEER_PYTHON [--schema tests/export/peer_schema.json]

PEER_PYTHON is the interpreter of an environment with llmcompressor (benchmarks/bench.mk makes one). A random Llama
whose widths divide by 128 is compressed by both, by rounding to nearest and by GPTQ. Compared are quantization_config,
and names, dtypes and shapes of all tensors; after rounding to nearest their values too. ``--schema`` stores what the
peer wrote (no values), for tests/export/test_peer_schema.py. Exit status 1 when something differs that
:func:`explanation` does not know.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

CASES = {
    f"{technique}_{scheme.lower()}": (technique, scheme)
    for technique in ("rtn", "gptq")
    for scheme in ("W4A16", "W8A16", "W8A8", "W4A16_ASYM")
}
SIZES = {"vocab_size": 256, "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
SAMPLES, TOKENS = 8, 64
ABSENT = "absent"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer_python", help="interpreter of the environment that has llmcompressor")
    parser.add_argument("--schema", type=Path, help="store the peer's schema here")
    parser.add_argument("--folder", type=Path, help="keep the folders here (default: a temporary place)")
    parser.add_argument("--as-peer", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.as_peer:
        export_as_peer(arguments.folder)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        root = arguments.folder or Path(temporary)
        make_model(root / "dense")
        for name in CASES:
            export_ours(root, name)
        command = [arguments.peer_python, __file__, arguments.peer_python, "--as-peer", "--folder", str(root)]
        subprocess.run(command, check=True)
        if arguments.schema:
            store_schema(root, arguments.schema)
        return report(root)


def make_model(folder: Path) -> None:
    """A Llama with random weights, as a folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)).save_pretrained(folder)


def calibration() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, SIZES["vocab_size"], (SAMPLES, TOKENS), generator=generator).tolist()


def export_ours(root: Path, name: str) -> None:
    from transformers import LlamaForCausalLM

    from lightning_compress import GPTQModifier, QuantizationModifier, compress, save

    technique, scheme = CASES[name]
    model = LlamaForCausalLM.from_pretrained(root / "dense").eval()
    recipe = {"targets": ["Linear"], "ignore": ["lm_head"], "scheme": scheme}
    if technique == "rtn":
        compress(model, QuantizationModifier(**recipe))
    else:
        batches = [{"input_ids": torch.tensor([row])} for row in calibration()]
        compress(model, GPTQModifier(**recipe, scale_search="minmax"), batches)
    save(model, root / "ours" / name, overwrite=(root / "ours" / name).exists())


def export_as_peer(root: Path) -> None:
    """Runs in the peer's environment: the same recipes through llmcompressor."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from tokenizers import Tokenizer, models
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    words = models.WordLevel({str(number): number for number in range(SIZES["vocab_size"])}, unk_token="0")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="0")
    rows = calibration()
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * TOKENS] * SAMPLES})
    sampling = {"num_calibration_samples": SAMPLES, "max_seq_length": TOKENS, "shuffle_calibration_samples": False}
    for name, (technique, scheme) in CASES.items():
        model = LlamaForCausalLM.from_pretrained(root / "dense").eval()
        recipe = {"targets": ["Linear"], "ignore": ["lm_head"], "scheme": scheme}
        if technique == "rtn":
            oneshot(model=model, tokenizer=tokenizer, recipe=QuantizationModifier(**recipe))
        else:
            oneshot(model=model, tokenizer=tokenizer, recipe=GPTQModifier(**recipe), dataset=data, **sampling)
        model.save_pretrained(root / "peer" / name, save_compressed=True)


def schema_of(folder: Path) -> dict[str, Any]:
    """quantization_config, and dtype and shape of each tensor by name."""
    from safetensors import safe_open

    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (it is not a dict)
            tensors |= {name: [part.get_dtype(), part.get_shape()] for name, part in slices.items()}
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    return {"quantization_config": config, "tensors": tensors}


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, leaf) of nested dicts; an empty dict is a leaf."""
    if isinstance(value, dict) and value:
        for key in sorted(value):
            yield from flat(value[key], f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, value


def differences(ours: Any, peers: Any) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ: (ours, the peer's)."""
    left, right = dict(flat(ours)), dict(flat(peers))
    keys = sorted(left.keys() | right.keys())
    return {k: (left.get(k, ABSENT), right.get(k, ABSENT)) for k in keys if left.get(k, ABSENT) != right.get(k, ABSENT)}


def explanation(key: str, ours: Any, peers: Any) -> str | None:
    """Reason why a key of quantization_config differs, if it is known and has no effect on readers of the folder."""
    last = key.rpartition(".")[2]
    if key == "version":
        return "the version of compressed-tensors: the peer is pinned to 0.19"
    if key == "moe_sparsity_config" and (ours, peers) == (None, ABSENT):
        return "a field that compressed-tensors 0.20 added"
    if last in {"actorder", "block_structure", "observer", "observer_kwargs", "scale_dtype", "zp_dtype"}:
        if ours == ABSENT and peers in (None, {}):
            return "0.19 writes defaults out, 0.20 leaves them out"
    if last == "zp_dtype" and (ours, peers) == (ABSENT, "torch.int8"):
        return "0.19 writes the dtype that both derive from the bits, 0.20 leaves it out"
    if last == "observer" and (ours, peers) == (ABSENT, "memoryless_minmax"):
        return "the name of the peer's observer; readers of weights do not use it"
    if key == "dequantize" and (ours, peers) == (True, ABSENT):
        return "transformers 5.23 loads packed zero points only this way; vLLM does not read it"
    return None


def unequal_values(ours: Path, peers: Path) -> list[str]:
    from safetensors.torch import load_file

    left, right = load_file(ours / "model.safetensors"), load_file(peers / "model.safetensors")
    return [name for name in sorted(left.keys() & right.keys()) if not torch.equal(left[name], right[name])]


def report(root: Path) -> int:
    """Print the comparison; 1 when something unexplained differs."""
    print("case             config keys  explained  unexplained  tensors  differ  values differ")
    reasons: dict[str, set[str]] = {}
    bad: list[str] = []
    for name, (technique, _) in CASES.items():
        ours, peers = schema_of(root / "ours" / name), schema_of(root / "peer" / name)
        config = differences(ours["quantization_config"], peers["quantization_config"])
        unexplained = {key: pair for key, pair in config.items() if explanation(key, *pair) is None}
        tensors = differences(ours["tensors"], peers["tensors"])
        values = unequal_values(root / "ours" / name, root / "peer" / name) if technique == "rtn" else []
        keys = len(dict(flat(ours["quantization_config"])))
        explained = len(config) - len(unexplained)
        shown = len(values) if technique == "rtn" else "-"
        counts = f"{keys:12} {explained:10} {len(unexplained):12} {len(ours['tensors']):8} {len(tensors):7}"
        print(f"{name:16} {counts} {shown:>14}")
        for key, pair in config.items():
            reasons.setdefault(explanation(key, *pair) or "unexplained", set()).add(key)
        bad += [f"{name}: {key}: ours {o!r}, the peer's {p!r}" for key, (o, p) in {**unexplained, **tensors}.items()]
        bad += [f"{name}: values of {tensor} differ" for tensor in values]
    for reason, found in reasons.items():
        print(f"\n{reason}:\n  {', '.join(sorted(found))}")
    print("\n" + "\n".join(bad or ["nothing unexplained differs"]))
    return int(bool(bad))


def store_schema(root: Path, path: Path) -> None:
    """The peer's schema of each case; tests/export/test_peer_schema.py compares ours with it."""
    command = "python benchmarks/compare_export.py PEER_PYTHON --schema tests/export/peer_schema.json"
    cases = {name: schema_of(root / "peer" / name) for name in CASES}
    lines = ",\n".join(
        f'  "{name}": {{\n   "quantization_config": {json.dumps(case["quantization_config"], sort_keys=True)},\n'
        f'   "tensors": {json.dumps(case["tensors"], sort_keys=True)}}}'
        for name, case in cases.items()
    )
    model = json.dumps(SIZES | HEADS)
    path.write_text(f'{{"made_by": {json.dumps(command)},\n "model": {model},\n "cases": {{\n{lines}\n }}}}\n')


if __name__ == "__main__":
    sys.exit(main())
