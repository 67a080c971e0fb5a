"""The architectures that are written: their names in llama.cpp, the order of their rows, and the metadata of a config.

llama.cpp turns neighbouring pairs of the rows of a head in ``llama`` (interleaved rotary embeddings), transformers the
rows i and i + D / 2; so rows of q and k move there. ``qwen2`` and ``qwen3`` have the order of transformers.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Architecture", "architecture_of"]

ROPE_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class Architecture:
    """One architecture of llama.cpp.

    Args:
        name: Its name there.
        config: The config of the model.
        interleaved: Whether rows of q and k are reordered.
    """

    name: str
    config: Any
    interleaved: bool

    @property
    def head_dim(self) -> int:
        """D."""
        return int(getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads)

    def reordered(self, name: str, rows: Tensor) -> Tensor:
        """A tensor [R, ...] of the model with the rows in the order of llama.cpp; q8 and q4 bytes are rows, too."""
        heads = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}
        module = name.split(".")[-2] if "." in name else ""
        if not self.interleaved or module not in heads:
            return rows
        return rows.unflatten(0, (heads[module], 2, -1)).transpose(1, 2).flatten(0, 2)

    def add_metadata(self, writer: Any) -> None:
        """Write what llama.cpp needs to build the model."""
        config = self.config
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(self.head_dim)
        writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
        if self.rope_type == "linear":
            writer.add_rope_scaling_type(_linear())
            writer.add_rope_scaling_factor(float(config.rope_parameters["factor"]))
        writer.add_vocab_size(config.vocab_size)

    @property
    def rope_type(self) -> str:
        """Of the rotary embeddings, as transformers names it."""
        return str(self.config.rope_parameters.get("rope_type", "default"))

    def rope_factors(self) -> Tensor | None:
        """What llama.cpp divides the frequencies of Llama 3 by, float32 [D / 2]; None for other rotary embeddings."""
        if self.rope_type != "llama3":
            return None
        rope = self.config.rope_parameters
        factor, low, high, length = (float(rope[key]) for key in ROPE_KEYS)
        powers = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device="cpu") / self.head_dim
        wavelengths = 2 * math.pi * float(rope["rope_theta"]) ** powers
        smooth = ((length / wavelengths - low) / (high - low)).clamp(0, 1)  # 1: a short wave, which stays
        return (1 / ((1 - smooth) / factor + smooth)).float()


def architecture_of(model: nn.Module) -> Architecture:
    """The architecture of a model; ValueError names what llama.cpp would compute otherwise."""
    known = {"LlamaForCausalLM": ("llama", True), "Qwen2ForCausalLM": ("qwen2", False),
             "Qwen3ForCausalLM": ("qwen3", False)}  # fmt: skip
    kind = type(model).__name__
    if kind not in known:
        raise ValueError(f"GGUF is written for {', '.join(known)}, and this is a {kind}; save it in another format")
    config: Any = model.config
    architecture = Architecture(known[kind][0], config, known[kind][1])
    ropes = ("default", "linear", "llama3") if architecture.name == "llama" else ("default", "linear")
    if architecture.rope_type not in ropes:
        raise ValueError(
            f"rotary embeddings of type {architecture.rope_type!r} are not written to GGUF for {kind}, only "
            f"{', '.join(ropes)}; save it in another format"
        )
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
        raise ValueError(f"this {kind} has a sliding window, which is not written to GGUF; save it in another format")
    if config.hidden_act != "silu":
        raise ValueError(f"this {kind} has hidden_act={config.hidden_act!r}, and llama.cpp computes silu")
    return architecture


def _linear() -> Any:
    from gguf import RopeScalingType

    return RopeScalingType.LINEAR
