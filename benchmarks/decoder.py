"""Decoding with a Llama, one token after another: keys and values in static buffers, so that a step can be captured.

q, k, v are one product, and gate, up another. A weight is dense, or packed int4.

Shapes: H hidden size, d size of a head, T positions, G groups of queries that share keys and values.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import llama
from lightning_compress.ops.w4a16_gemm import w4a16_gemm

__all__ = ["Block", "Decoder", "Weight", "decode_block"]

Weight = tuple[Tensor, ...]  # (W,), or planes and scale of packed int4


@dataclass(frozen=True)
class Block:
    """Weights of one block."""

    norms: tuple[Tensor, Tensor]
    qkv: Weight
    o: Weight
    gate_up: Weight
    down: Weight


class Decoder:
    """One token after another; all that changes lies in buffers, so that a step can be captured.

    Args:
        shape: Of the model.
        blocks: Weights.
        ends: Embedding [vocabulary, H], weight of the last norm [H], output layer [vocabulary, H].
        positions: T.
        step_block: :func:`decode_block`, or what a compiler made of it.
    """

    def __init__(
        self,
        shape: llama.Shape,
        blocks: Sequence[Block],
        ends: tuple[Tensor, Tensor, Tensor],
        positions: int,
        step_block: Callable[..., Tensor] | None = None,
    ):
        self.shape, self.blocks, self.ends = shape, blocks, ends
        self.step_block = step_block or decode_block
        embedding = ends[0]
        device, dtype = embedding.device, embedding.dtype
        sizes = shape.kv_heads, positions, shape.head
        # keys and values in storages of their own: where inputs share one and are written, torch.compile makes copies
        self.caches = [
            (torch.zeros(sizes, device=device, dtype=dtype), torch.zeros(sizes, device=device, dtype=dtype))
            for _ in blocks
        ]
        self.cos_Td, self.sin_Td = llama.rotations(shape, torch.arange(positions, device=device), dtype)
        self.all_T = torch.arange(positions, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.token = torch.zeros(1, dtype=torch.long, device=device)

    def step(self) -> Tensor:
        """Logits [1, vocabulary] after the token; the next token and its position take their place."""
        embedding, norm, head = self.ends
        x = embedding[self.token]
        cos, sin = self.cos_Td[self.position], self.sin_Td[self.position]
        later_T = self.all_T > self.position
        for block, (keys, values) in zip(self.blocks, self.caches, strict=True):
            x = self.step_block(
                x, block.norms, block.qkv, block.o, block.gate_up, block.down, keys, values, self.position, later_T,
                cos, sin, self.shape,
            )  # fmt: skip
        logits = F.linear(F.rms_norm(x, norm.shape, norm, self.shape.eps), head)
        self.token.copy_(logits.argmax(-1))
        self.position.add_(1)
        return logits

    def begin(self, token: int, position: int) -> None:
        """The next step takes this token at this position."""
        self.token.fill_(token)
        self.position.fill_(position)


def decode_block(
    x: Tensor,
    norms: tuple[Tensor, Tensor],
    qkv: Weight,
    o: Weight,
    gate_up: Weight,
    down: Weight,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    later_T: Tensor,
    cos: Tensor,
    sin: Tensor,
    shape: llama.Shape,
) -> Tensor:
    """What one block makes of one token x [1, H]; its key and value go into the buffers [kv heads, T, d]."""
    sizes = [shape.heads, shape.kv_heads, shape.kv_heads]
    heads = product(F.rms_norm(x, norms[0].shape, norms[0], shape.eps), qkv).view(-1, shape.head)
    query, key, value = heads.split(sizes)
    query, key = llama.rotated(query, cos, sin), llama.rotated(key, cos, sin)
    keys.index_copy_(1, position, key[:, None])
    values.index_copy_(1, position, value[:, None])
    query = query.view(shape.kv_heads, -1, shape.head)  # [kv heads, G, d]: no key is read twice
    score = torch.matmul(query, keys.mT) * shape.head**-0.5
    share = score.masked_fill(later_T, float("-inf")).float().softmax(-1).to(x.dtype)
    x = x + product(torch.matmul(share, values).reshape(1, -1), o)
    gate, up = product(F.rms_norm(x, norms[1].shape, norms[1], shape.eps), gate_up).chunk(2, -1)
    return x + product(F.silu(gate) * up, down)


def product(x: Tensor, weight: Weight) -> Tensor:
    return F.linear(x, weight[0]) if len(weight) == 1 else w4a16_gemm(x, *weight)
