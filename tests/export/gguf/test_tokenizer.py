"""Metadata of tokenizers: tokens by id, their types, merges, rules; unknown ones are refused by name."""

import pytest
import tokenizers
from gguf import TokenType
from tokenizers import Regex, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightning_compress.export.gguf.tokenizer import WORDS, add_tokenizer, tokenizer_among

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


class Writer:
    def __init__(self):
        self.values = {}

    def __getattr__(self, name):
        return lambda value: self.values.update({name.removeprefix("add_"): value})


def make(pre=None, model=None, **special):
    vocab = {"a": 0, "b": 1, "ab": 2}
    backend = tokenizers.Tokenizer(model or tokenizers.models.BPE(vocab, [("a", "b")]))
    backend.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.add_tokens(["<tool>"])
    return tokenizer


def written(tokenizer, vocab_size=8):
    writer = Writer()
    add_tokenizer(writer, tokenizer, vocab_size)
    return writer.values


def test_tokens_types_and_special_ids():
    tokenizer = make(eos_token="<end>", bos_token="<begin>")
    tokenizer.chat_template = "{{ messages }}"
    values = written(tokenizer)
    ids = {text: values["token_list"].index(text) for text in ("<end>", "<begin>", "<tool>")}
    assert values["token_list"][:3] == ["a", "b", "ab"]
    assert values["token_list"][6:] == ["[PAD6]", "[PAD7]"]
    normal, control, user, unused = TokenType.NORMAL, TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNUSED
    assert [values["token_types"][ids[text]] for text in ids] == [control, control, user]
    assert values["token_types"][:3] + values["token_types"][6:] == [normal] * 3 + [unused] * 2
    assert values["token_merges"] == ["a b"]
    assert (values["eos_token_id"], values["bos_token_id"]) == (ids["<end>"], ids["<begin>"])
    assert values["add_bos_token"] is False
    assert values["chat_template"] == "{{ messages }}"
    assert (values["tokenizer_model"], values["tokenizer_pre"]) == ("gpt2", "gpt-2")


def test_a_first_token_that_the_tokenizer_adds():
    tokenizer = make(bos_token="<begin>")
    begin = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<begin> $A", special_tokens=[("<begin>", begin)]
    )
    assert written(tokenizer)["add_bos_token"] is True


@pytest.mark.parametrize(
    ("pre", "name"),
    [
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES]), "smollm"),
        (pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORDS.format(digits="")), "isolated"), BYTES]), "qwen2"),
        (
            pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORDS.format(digits="{1,3}")), "isolated"), BYTES]),
            "llama-bpe",
        ),
    ],
)
def test_rules_by_name(pre, name):
    assert written(make(pre))["tokenizer_pre"] == name


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"the pre-tokenizer \('Whitespace',\) of the tokenizer is not one of those"):
        written(make(pre_tokenizers.Whitespace()))
    with pytest.raises(ValueError, match="with a model of type 'WordLevel' is not written to GGUF, only byte-level"):
        written(make(model=tokenizers.models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ValueError, match="the tokenizer has 4 tokens, and the model 3"):
        written(make(), vocab_size=3)


def test_the_tokenizer_of_a_processor_is_found():
    class Processor:
        tokenizer = make()

    assert tokenizer_among([object(), Processor()]) is Processor.tokenizer
    assert tokenizer_among([object()]) is None
    assert written(None) == {"tokenizer_model": "none"}
