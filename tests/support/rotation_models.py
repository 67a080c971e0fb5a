"""Toy models of transformers whose gains, biases and outlier channels make a wrong rotation visible."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SIZES, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def build(kind: str, **settings) -> nn.Module:
    """A model with weights far from their initial ones, in eval mode."""
    torch.manual_seed(0)
    model = MODELS[kind](settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.mul_(2)
    return model.eval()


def logits(model: nn.Module, tokens: int = 24, seed: int = 1) -> Tensor:
    ids = torch.randint(0, 64, (2, tokens), generator=torch.Generator().manual_seed(seed))
    keywords = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **keywords).logits


def output_change(model: nn.Module, before: Tensor) -> float:
    """The largest change of the logits, as a share of the largest of them before."""
    return ((logits(model) - before).abs().max() / before.abs().max()).item()


def token_batches(count: int = 4, rows: int = 4, tokens: int = 32, vocabulary: int = 64) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [{"input_ids": torch.randint(0, vocabulary, (rows, tokens), generator=generator)} for _ in range(count)]


def plant_outliers(model: nn.Module, channels: tuple[int, ...] = (3, 17), times: float = 30.0) -> nn.Module:
    """Make a few channels large where Linears of a Llama see them, and their columns small: the same function."""
    at = list(channels)
    with torch.no_grad():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            layer.input_layernorm.weight[at] *= times
            layer.post_attention_layernorm.weight[at] *= times
            for reader in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
                reader.weight[:, at] /= times
    return model


def _of(name: str, base: dict, **fixed) -> Callable[[dict], nn.Module]:
    def make(settings: dict) -> nn.Module:
        import transformers

        config_class = getattr(transformers, f"{name}Config")
        for suffix in ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM", "Model"):
            if (model_class := getattr(transformers, name + suffix, None)) is not None:
                break
        ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
        return model_class(config_class(**{**base, **fixed, **ends, **settings}))

    return make


MODELS: dict[str, Callable[[dict], nn.Module]] = {
    "llama": _of("Llama", GROUPED),
    "qwen2": _of("Qwen2", GROUPED),
    "qwen3": _of("Qwen3", GROUPED, head_dim=8),
    "gemma": _of("Gemma", GROUPED, head_dim=8),
    "gemma2": _of("Gemma2", GROUPED, head_dim=8),
    "phi": _of("Phi", GROUPED),
    "phi3": _of("Phi3", GROUPED),
    "cohere": _of("Cohere", GROUPED),
    "mixtral": _of("Mixtral", GROUPED, num_local_experts=4),
    "qwen3_moe": _of("Qwen3Moe", GROUPED, head_dim=8, **EXPERTS),
    "gpt_neox": _of("GPTNeoX", SIZES),
    "bert": _of("Bert", SIZES),
    "olmo2": _of("Olmo2", GROUPED),
    "gpt2": _of("GPT2", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "opt": _of("OPT", {k: v for k, v in SIZES.items() if k != "intermediate_size"}, ffn_dim=48, word_embed_proj_dim=32,
               max_position_embeddings=64),
    "t5": _of("T5", {"vocab_size": 64, "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8},
              decoder_start_token_id=0),
}  # fmt: skip
