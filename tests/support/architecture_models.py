"""One toy model of each architecture, what it is fed, and the class that plain transformers loads it with."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = {"vocab_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64}
TEXT = {**SIZES, **TOKENS}
GROUPED = {**TEXT, "num_key_value_heads": 2}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
SPEECH = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
          "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}  # fmt: skip
PICTURE = {**SIZES, "image_size": 16, "patch_size": 8}


@dataclass(frozen=True)
class Architecture:
    """How a toy model is made.

    Args:
        model: Its class in transformers.
        config: The class of its config.
        sizes: The config's arguments.
        inputs: ``text``, ``pairs`` (encoder-decoder), ``picture``, ``speech``, ``both`` (picture and text).
    """

    model: str
    config: str
    sizes: dict[str, Any]
    inputs: str = "text"

    def build(self) -> nn.Module:
        """The model, its weights far enough from zero that an error in one of them is visible in the logits."""
        import transformers

        torch.manual_seed(0)
        made = getattr(transformers, self.model)(getattr(transformers, self.config)(**self.sizes))
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.ndim < 2:
                    parameter.add_(0.1 * torch.randn_like(parameter))
                else:
                    parameter.copy_(torch.randn_like(parameter) * (0.4 / parameter[0].numel() ** 0.5 + 0.05))
        return made.eval()

    def batches(self, count: int = 4) -> list[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(1)
        return [INPUTS[self.inputs](generator) for _ in range(count)]


def _tokens(generator: torch.Generator) -> Tensor:
    return torch.randint(3, 48, (4, 16), generator=generator)


def _pixels(generator: torch.Generator) -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=generator)


INPUTS: dict[str, Callable[[torch.Generator], dict[str, Tensor]]] = {
    "text": lambda g: {"input_ids": _tokens(g)},
    "pairs": lambda g: {"input_ids": _tokens(g), "decoder_input_ids": _tokens(g)},
    "picture": lambda g: {"pixel_values": _pixels(g)},
    "speech": lambda g: {"input_features": torch.randn(2, 16, 64, generator=g), "decoder_input_ids": _tokens(g)[:2]},
    "both": lambda g: {"pixel_values": _pixels(g), "input_ids": _tokens(g)},
}


def _causal(name: str, sizes: dict[str, Any], **more: Any) -> Architecture:
    return Architecture(f"{name}ForCausalLM", f"{name}Config", {**sizes, **more})


ARCHITECTURES = {
    "llama": _causal("Llama", GROUPED, tie_word_embeddings=False),
    "qwen2": _causal("Qwen2", GROUPED),
    "qwen3": _causal("Qwen3", GROUPED, head_dim=8),
    "mistral": _causal("Mistral", GROUPED, sliding_window=8),
    "gemma2": _causal("Gemma2", GROUPED, head_dim=8, sliding_window=8),
    "gemma3": Architecture("Gemma3ForCausalLM", "Gemma3TextConfig", {**GROUPED, "head_dim": 8, "sliding_window": 8}),
    "phi": _causal("Phi", TEXT),
    "phi3": _causal("Phi3", GROUPED),
    "olmo2": _causal("Olmo2", GROUPED),
    "gpt2": Architecture("GPT2LMHeadModel", "GPT2Config", {
        "vocab_size": 48, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1,
        "eos_token_id": 2,
    }),
    "opt": _causal("OPT", {k: v for k, v in TEXT.items() if k != "intermediate_size"}, ffn_dim=64,
                   word_embed_proj_dim=32),
    "gpt_neox": _causal("GPTNeoX", TEXT),
    "bloom": _causal("Bloom", {"vocab_size": 48, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon": _causal("Falcon", {k: v for k, v in TEXT.items() if k != "intermediate_size"}),
    "bert": Architecture("BertForMaskedLM", "BertConfig", TEXT),
    "minilm": Architecture("BertForSequenceClassification", "BertConfig", TEXT),
    "roberta": Architecture("RobertaForMaskedLM", "RobertaConfig", TEXT),
    "distilbert": Architecture("DistilBertForMaskedLM", "DistilBertConfig", {
        "vocab_size": 48, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64,
    }),
    "t5": Architecture("T5ForConditionalGeneration", "T5Config", {
        "vocab_size": 48, "d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 4, "d_kv": 8,
        "decoder_start_token_id": 0,
    }, "pairs"),
    "bart": Architecture("BartForConditionalGeneration", "BartConfig", {**TOKENS, **SPEECH}, "pairs"),
    "vit": Architecture("ViTForImageClassification", "ViTConfig", PICTURE, "picture"),
    "resnet": Architecture("ResNetForImageClassification", "ResNetConfig", {
        "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 1], "layer_type": "basic", "num_labels": 5,
    }, "picture"),
    "convnext": Architecture("ConvNextForImageClassification", "ConvNextConfig", {
        "hidden_sizes": [16, 32], "depths": [1, 2], "patch_size": 2, "num_stages": 2, "num_labels": 5,
    }, "picture"),
    "whisper": Architecture("WhisperForConditionalGeneration", "WhisperConfig", {
        **SPEECH, "vocab_size": 48, "num_mel_bins": 16, "max_source_positions": 32, "max_target_positions": 32,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
        "begin_suppress_tokens": None,
    }, "speech"),
    "clip": Architecture("CLIPModel", "CLIPConfig", {
        "text_config": TEXT, "vision_config": PICTURE, "projection_dim": 32,
    }, "both"),
    "mamba": _causal("Mamba", {"vocab_size": 48, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2,
                               "time_step_rank": 4}),
    "mixtral": _causal("Mixtral", GROUPED, num_local_experts=4),
    "qwen3_moe": _causal("Qwen3Moe", GROUPED, num_experts=4, head_dim=8, norm_topk_prob=True, **EXPERTS),
    "deepseek_v3": _causal("DeepseekV3", TEXT, n_routed_experts=4, n_group=2, topk_group=1, q_lora_rank=32,
                           kv_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
                           first_k_dense_replace=1, n_shared_experts=1, num_key_value_heads=4, **EXPERTS),
}  # fmt: skip
