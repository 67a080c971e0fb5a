"""A Llama in plain torch, for machines without transformers: same names, same arithmetic, random weights.

Shapes: B batch, T tokens, H hidden size, d size of a head.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LLAMA_3_8B", "TINY", "Body", "Llama", "Shape", "random_llama", "rotated", "rotations"]

INITIAL = 0.02  # standard deviation of random weights


@dataclass(frozen=True)
class Shape:
    """Sizes of a model.

    Args:
        layers: Number of blocks.
        hidden: H.
        intermediate: Between up and down projection.
        heads: Of the queries.
        kv_heads: Of keys and values.
        vocabulary: Number of tokens.
        theta: Base of the rotations' frequencies.
        eps: Under the root of the norms.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    theta: float = 500000.0
    eps: float = 1e-5

    @property
    def head(self) -> int:
        """d."""
        return self.hidden // self.heads

    @property
    def products(self) -> dict[str, tuple[int, int]]:
        """Output and input features of a block's products, those that share an input taken together."""
        rows = (self.heads + 2 * self.kv_heads) * self.head
        return {
            "qkv": (rows, self.hidden),
            "o": (self.hidden, self.hidden),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }


LLAMA_3_8B = Shape(32, 4096, 14336, 32, 8, 128256)
TINY = Shape(2, 64, 128, 4, 2, 96)


class Attention(nn.Module):
    """Causal, queries in groups that share keys and values."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        H, d = shape.hidden, shape.head
        self.q_proj = nn.Linear(H, shape.heads * d, bias=False)
        self.k_proj = nn.Linear(H, shape.kv_heads * d, bias=False)
        self.v_proj = nn.Linear(H, shape.kv_heads * d, bias=False)
        self.o_proj = nn.Linear(shape.heads * d, H, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        query, key, value = (
            linear(x).unflatten(-1, (-1, self.shape.head)).transpose(1, 2)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = rotated(query, cos, sin), rotated(key, cos, sin)
        repeats = self.shape.heads // self.shape.kv_heads
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention and MLP, each after a norm and beside a residual."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden, shape.eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden, shape.eps)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    """All but the output layer."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, shape.eps)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed_tokens(input_ids)
        cos, sin = rotations(self.shape, torch.arange(input_ids.shape[1], device=x.device), x.dtype)
        for block in self.layers:
            x = block(x, cos, sin)
        return self.norm(x)


class Llama(nn.Module):
    """Logits [B, T, vocabulary] of token ids [B, T]."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.model = Body(shape)
        self.lm_head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.lm_head(self.model(input_ids))


def rotations(shape: Shape, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, d] of the positions [T]."""
    steps = torch.arange(0, shape.head, 2, device=positions.device, dtype=torch.float32) / shape.head
    angles = positions.float()[:, None] * shape.theta**-steps
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each half of a head's channels is the other's partner."""
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin


def random_llama(model: type[Body] | type[Llama], shape: Shape, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """With random weights, made where they are used: 8 billion of them take minutes on a CPU."""
    with torch.device("meta"):
        made = model(shape).to(dtype)
    made = made.to_empty(device=device).eval().requires_grad_(False)
    random = torch.Generator(device).manual_seed(0)
    for name, parameter in made.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, INITIAL, generator=random)
    return made
