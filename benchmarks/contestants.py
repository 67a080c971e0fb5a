"""Other projects' kernels for the same packed weights, each optional: imported at the first call.

Layouts are those of compressed-tensors: codes int32 [N, K / 8], eight to a word, the first in the low bits, 8 above
their value; scales [N, K / group]. Other layouts are made at a kernel's first call.

Shapes: M tokens, N output features, K input features; R rows, B columns of a block.
"""

import importlib
import importlib.machinery
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lightning_compress.ops.w4a16_gemm import reference

__all__ = ["gemlite", "humming", "int4_products", "llm_compressor_block", "once", "tinygemm"]


def int4_products(x: Tensor, packed: Tensor, scale: Tensor, group: int) -> dict[str, Callable[[], Tensor]]:
    """x W^T by each of them, by name.

    Args:
        x: bf16 [M, K], on CUDA.
        packed: int32 [N, K / 8].
        scale: bf16 [N, K / group].
        group: Columns that share a scale.
    """
    made = {"torch int4pack": tinygemm, "gemlite": gemlite, "humming": humming}
    return {name: once(maker, x, packed, scale, group) for name, maker in made.items()}


def once(maker: Callable[..., Callable[[], Tensor]], *arguments: Any) -> Callable[[], Tensor]:
    """A call whose layout is made when it is called first."""
    call = cache(lambda: maker(*arguments))
    return lambda: call()()


def tinygemm(x: Tensor, packed: Tensor, scale: Tensor, group: int) -> Callable[[], Tensor]:
    """torch's own; its packing takes two codes in a byte, the first in the high bits."""
    codes = reference.unpack(packed, x.shape[1]).to(torch.uint8)
    words = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
    grid = torch.stack([scale.t(), torch.zeros_like(scale.t())], -1).contiguous()
    return lambda: torch.ops.aten._weight_int4pack_mm(x, words, group, grid)


def gemlite(x: Tensor, packed: Tensor, scale: Tensor, group: int) -> Callable[[], Tensor]:
    """gemlite (Triton), tuned as it tunes itself: shapes that its table for the GPU lacks take half a minute each."""
    library = importlib.import_module("gemlite")
    K, N = x.shape[1], len(packed)
    kind = library.DType.BF16
    layer = library.GemLiteLinear(
        4, group_size=group, in_features=K, out_features=N, input_dtype=kind, output_dtype=kind
    )
    if "h200" in torch.cuda.get_device_name(x.device).lower():  # no table of its own; the processors are the same
        library.load_config(str(Path(library.__file__).parent / "configs" / "h100.json"))
    layer.pack(reference.unpack(packed, K).to(torch.uint8), scale, reference.SYMMETRIC_ZERO, None)
    return lambda: layer(x)


def humming(x: Tensor, packed: Tensor, scale: Tensor, group: int) -> Callable[[], Tensor]:
    """humming-kernels (CUDA, compiled when first used)."""
    library = importlib.import_module("humming.layer")
    N, K = len(packed), x.shape[1]
    scheme = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "type": "int", "num_bits": 4,
        "strategy": "group", "group_size": group, "symmetric": True,
    }  # fmt: skip
    layer = library.HummingLayer(shape_n=N, shape_k=K, weight_config=scheme, torch_dtype=x.dtype).to(x.device)
    layer.load_from_tensors({"weight_packed": packed, "weight_scale": scale})
    layer.transform()
    return lambda: layer(x)


def llm_compressor_block(W_RB: Tensor, H_BB: Tensor, scale_RB: Tensor) -> Callable[[], Tensor]:
    """One block of columns by llm-compressor's fused kernel, symmetric int4: Q [R, B], dequantized.

    Args:
        W_RB: float32, on CUDA; what is rounded is a copy, made in every call, as llm-compressor makes one.
        H_BB: float32, damped; its kernel wants the upper Cholesky factor of H^-1, which is made at the first call.
        scale_RB: float32, of every weight.
    """
    fused = without_parents("llmcompressor.modifiers.gptq.gptq_quantize").fused_gptq_block_update
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H_BB.double()))
    hinv_BB = torch.linalg.cholesky(inverse, upper=True).float().contiguous()

    def call() -> Tensor:
        work = W_RB.clone()[None]
        quantized, errors = torch.empty_like(work), torch.empty_like(work)
        fused(work, hinv_BB[None], scale_RB[None], None, quantized, errors, -8.0, 7.0, 0)
        return quantized[0]

    return call


def without_parents(name: str) -> ModuleType:
    """A module of a package, without what the package itself imports (data sets, tuners ... that need not be there)."""
    *parents, _ = name.split(".")
    path: list[str] | None = None
    for depth in range(1, len(parents) + 1):
        parent = ".".join(parents[:depth])
        if parent not in sys.modules:
            spec = importlib.machinery.PathFinder.find_spec(parent, path)
            if spec is None or spec.submodule_search_locations is None:
                raise ModuleNotFoundError(f"No module named {parent!r}")
            module = ModuleType(parent)
            module.__path__ = list(spec.submodule_search_locations)
            module.__spec__ = spec
            sys.modules[parent] = module
        path = list(sys.modules[parent].__path__)
    return importlib.import_module(name)
