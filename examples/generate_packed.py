"""Text from 4-bit weights: eager decoding, and with a static cache and a compiled forward pass.

    python -m examples.generate_packed

On a GPU a packed product of one token is as short as its launch: eager decoding waits for the CPU, and gains nothing
from 4-bit weights. A static cache keeps all shapes, and with ``mode="reduce-overhead"`` a CUDA graph is replayed for
each token. The same code runs on a CPU, without graphs; most of the minutes that it takes there are compilation.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_compress import QuantizationModifier, compress, load, save


def main(arguments: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Compress a small Llama with random weights, load it packed, generate; the new tokens of each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2, help="decoder layers")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens to generate")
    parser.add_argument("--backend", default="inductor", help="of torch.compile; eager needs no C++ compiler")
    chosen = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=256, intermediate_size=512, num_hidden_layers=chosen.layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16()
    compress(model, QuantizationModifier(scheme="W4A16", ignore=["lm_head"]))
    with tempfile.TemporaryDirectory() as folder:
        packed = load(save(model, f"{folder}/w4"), device=device, fuse=False)  # compiled calls are not fused

    prompt = torch.tensor([list(b"def __init__(self")], device=device)
    tokens = {"eager": generate(packed, prompt, chosen.new_tokens)}
    mode = "reduce-overhead" if device == "cuda" and chosen.backend == "inductor" else None
    packed.forward = torch.compile(packed.forward, backend=chosen.backend, fullgraph=True, mode=mode)
    generate(packed, prompt, chosen.new_tokens, cache_implementation="static")  # compiles
    tokens["compiled"] = generate(packed, prompt, chosen.new_tokens, cache_implementation="static")
    return tokens


def generate(model: LlamaForCausalLM, prompt: Tensor, count: int, **options: str) -> Tensor:
    """The tokens that follow the prompt, greedily; prints how quickly."""
    start = time.perf_counter()
    tokens: Tensor = model.generate(
        prompt, min_new_tokens=count, max_new_tokens=count, do_sample=False, pad_token_id=0, disable_compile=True,
        **options,
    )  # fmt: skip
    print(f"{count / (time.perf_counter() - start):8.1f} tokens per second, {options or 'eager'}", flush=True)
    return tokens[0, prompt.shape[1] :]


if __name__ == "__main__":
    main()
