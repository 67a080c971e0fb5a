"""A small Llama, built from a ``transformers`` config and trained from random weights."""

from transformers import LlamaConfig, LlamaForCausalLM

from examples.causal_lm import CausalLM


class LlamaDemo(CausalLM):
    """A Llama of the given widths, which should be multiples of 128 for groups of 128 columns.

    Args:
        vocab_size: 256 for bytes.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the MLP.
        num_layers: Number of blocks.
        num_heads: Number of attention heads, each of width ``hidden_size / num_heads``.
        lr: Peak learning rate.
        weight_decay: For matrices only.
        warmup_share: Share of the steps in which the learning rate rises.
    """

    def __init__(
        self,
        vocab_size: int = 256,
        hidden_size: int = 256,
        intermediate_size: int = 512,
        num_layers: int = 2,
        num_heads: int = 4,
        lr: float = 3e-3,
        weight_decay: float = 0.1,
        warmup_share: float = 0.05,
    ) -> None:
        config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_heads,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
        )
        super().__init__(LlamaForCausalLM(config), lr, weight_decay, warmup_share)
        self.save_hyperparameters()
