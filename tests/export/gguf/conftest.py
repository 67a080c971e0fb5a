"""Small decoders of each architecture."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


@pytest.fixture(scope="session")
def decoder():
    def build(kind="llama", dtype=torch.bfloat16, **changes):
        sizes = {
            "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 128, "head_dim": 16,
            "bos_token_id": None, "eos_token_id": None,
        } | changes  # fmt: skip
        config, model = KINDS[kind]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            built = model(config(**sizes))
            for name, parameter in built.named_parameters():
                if name.endswith("bias"):
                    parameter.data.normal_()
        return built.to(dtype).eval()

    return build
