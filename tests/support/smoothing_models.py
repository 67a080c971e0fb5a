"""Tiny models of many architectures, their batches, and planted outlier channels."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.modifiers.smoothing.fold import fold
from lightning_compress.modifiers.smoothing.pair import Pair, parse
from lightning_compress.modifiers.smoothing.pair_finder import PairFinder

C, FF = 32, 64


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(C, FF), nn.Linear(C, FF), nn.Linear(FF, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Mixture(nn.Module):
    """Experts that each get the tokens routed to them; ``router`` is not a Linear: its weight is used in a function."""

    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.router = Router(experts)
        self.experts = nn.ModuleList(Expert() for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, C)
        gate, chosen = self.router(flat).softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            tokens = (chosen == number).nonzero()[:, 0]
            if len(tokens):
                out.index_add_(0, tokens, expert(flat[tokens]) * gate[tokens, None])
        return out.view_as(x)


class Router(nn.Module):
    def __init__(self, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, C) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


class MixtureBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mixture = nn.LayerNorm(C), Mixture()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixture(self.norm(x))


class Plain(nn.Module):
    """A residual block, named so that blocks are found: norm -> fc1 -> activation -> fc2."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.norm, self.fc1, self.act, self.fc2 = nn.LayerNorm(C), nn.Linear(C, FF), activation, nn.Linear(FF, C)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.act(self.fc1(self.norm(x))))


SIZES = {"hidden_size": C, "intermediate_size": FF, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = {"vocab_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
SMALL = {"n_embd": C, "n_layer": 2, "n_head": 4}


def _opt(t: Any) -> nn.Module:
    sizes = {"hidden_size": C, "ffn_dim": FF, "num_hidden_layers": 2, "num_attention_heads": 4}
    return t.OPTForCausalLM(t.OPTConfig(**sizes, **TOKENS, word_embed_proj_dim=C, max_position_embeddings=32))


def _t5(t: Any) -> nn.Module:
    sizes = {"d_model": C, "d_kv": 8, "d_ff": FF, "num_layers": 2, "num_heads": 4}
    return t.T5ForConditionalGeneration(t.T5Config(**sizes, **TOKENS, decoder_start_token_id=0))


def _vit(t: Any) -> nn.Module:
    return t.ViTForImageClassification(t.ViTConfig(**SIZES, image_size=8, patch_size=4))


TRANSFORMERS: dict[str, Callable[[Any], nn.Module]] = {
    "llama": lambda t: t.LlamaForCausalLM(t.LlamaConfig(**SIZES, **TOKENS, num_key_value_heads=2)),
    "gemma3": lambda t: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**SIZES, **TOKENS, num_key_value_heads=2, head_dim=8)),
    "phi3": lambda t: t.Phi3ForCausalLM(t.Phi3Config(**SIZES, **TOKENS, num_key_value_heads=2)),
    "neox": lambda t: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**SIZES, **TOKENS)),
    "gpt2": lambda t: t.GPT2LMHeadModel(t.GPT2Config(**SMALL, **TOKENS, n_positions=32)),
    "opt": _opt,
    "bert": lambda t: t.BertForMaskedLM(t.BertConfig(**SIZES, **TOKENS)),
    "t5": _t5,
    "mixtral": lambda t: t.MixtralForCausalLM(
        t.MixtralConfig(**SIZES, **TOKENS, num_key_value_heads=2, num_local_experts=4)
    ),
    "vit": _vit,
}
PLAIN_TORCH: dict[str, Callable[[], nn.Module]] = {
    "mixture": lambda: nn.Sequential(MixtureBlock(), MixtureBlock()),
    "relu": lambda: nn.Sequential(Plain(nn.ReLU(inplace=True)), Plain(nn.ReLU(inplace=True))),
    "gelu": lambda: nn.Sequential(Plain(nn.GELU()), Plain(nn.GELU())),
    "flat": lambda: nn.Sequential(nn.LayerNorm(C), nn.Linear(C, FF), nn.ReLU(), nn.Linear(FF, C)),
}
NAMES = [*TRANSFORMERS, *PLAIN_TORCH]


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model whose norms and biases are no longer ones and zeros."""
    torch.manual_seed(0)
    if name in PLAIN_TORCH:
        model = PLAIN_TORCH[name]()
    else:
        model = TRANSFORMERS[name](pytest.importorskip("transformers"))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
        else:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.to(dtype).eval()


def batches(name: str, count: int = 3, seed: int = 1) -> list[Any]:
    """Inputs with, for language models, one padded batch."""
    generator = torch.Generator().manual_seed(seed)
    if name in PLAIN_TORCH:
        return [torch.randn(2, 12, C, generator=generator) for _ in range(count)]
    if name == "vit":
        return [{"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)} for _ in range(count)]
    data = []
    for i in range(count):
        ids = torch.randint(3, 48, (2, 12), generator=generator)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        batch["attention_mask"][0, : 3 * (i == 1)] = 0
        data.append(batch | ({"decoder_input_ids": ids.clone()} if name == "t5" else {}))
    return data


def output(model: nn.Module, batch: Any) -> Tensor:
    """Logits, or the plain output."""
    with torch.no_grad():
        result = model(**batch) if isinstance(batch, dict) else model(batch)
    return result if isinstance(result, Tensor) else result.logits


def targets(name: str) -> list[str]:
    return ["Conv1D"] if name == "gpt2" else ["Linear"]


def ignore(model: nn.Module) -> list[str]:
    """Heads: the last layers, outside of all blocks."""
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and ("head" in n or n == "classifier")]


def change(model: nn.Module, dense: nn.Module, data: Sequence[Any]) -> float:
    """||new - old|| / ||old|| over some batches."""
    before, after = (torch.cat([output(m, batch).flatten() for batch in data]) for m in (dense, model))
    return float((after - before).norm() / before.norm())


def find_pairs(
    model: str | nn.Module, data: Sequence[Any], mappings: list[Any] | None = None
) -> tuple[nn.Module, dict[str, nn.Module], list[Pair]]:
    """A model as one block, its modules, and the pairs that feed its linear layers but for the heads."""
    model = build(model) if isinstance(model, str) else model
    modules = {name: module for name, module in model.named_modules() if name}
    layers = {n: m for n, m in linears(modules).items() if "head" not in n and n != "classifier"}
    finder = PairFinder(model, layers, None if mappings is None else parse(mappings))

    def replay(i: int) -> Any:
        return model(**data[i]) if isinstance(data[i], dict) else model(data[i])

    with torch.no_grad():
        return model, modules, finder.pairs("", modules, replay)


def linears(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    return {n: m for n, m in modules.items() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}


def planted(model: nn.Module, batch: Any, factor: float = 60.0, channels: Sequence[int] = (3, 17)) -> nn.Module:
    """Outliers as real models have them: some channels of norms much larger, the weights behind them smaller."""
    modules = {name: module for name, module in model.named_modules() if name}
    with torch.no_grad():
        pairs = PairFinder(model, linears(modules)).pairs("", modules, lambda _: output(model, batch))
    for pair in pairs:
        if "norm" in pair.source or "ln_" in pair.source:
            s_J = torch.ones(len(pair.channels_J))
            s_J[list(channels)] = 1 / factor
            fold(pair, modules, s_J)
    return model
