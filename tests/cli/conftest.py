"""A small Llama on disk, with a byte-level tokenizer, and a text."""

import pytest
import tokenizers
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXT = "the quick brown fox jumps over a lazy dog while seven wizards brew potions of zinc"
WORDS = TEXT.split()


def write_model(folder, **changes):
    sizes = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 300, "bos_token_id": None, "eos_token_id": None,
    } | changes  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
    return folder


def write_tokenizer(folder):
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([TEXT], trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("cli") / "dense")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    generator = torch.Generator().manual_seed(0)
    words = [WORDS[i] for i in torch.randint(len(WORDS), (3000,), generator=generator)]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(words))
    return path
