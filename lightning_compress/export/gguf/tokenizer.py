"""A byte-level BPE tokenizer of transformers as metadata of GGUF.

llama.cpp splits texts into words by rules of its own, which ``tokenizer.ggml.pre`` names; they are found by comparing
the pre-tokenizer of the file tokenizer.json with those that the rules were made for.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["add_tokenizer", "tokenizer_among"]

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
RULES = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (WORDS.format(digits=""), "ByteLevel"): "qwen2",
    (WORDS.format(digits="{1,3}"), "ByteLevel"): "llama-bpe",
}


def tokenizer_among(processors: Sequence[Any]) -> Any:
    """The tokenizer of a list of tokenizers and processors; None without one."""
    candidates = [getattr(processor, "tokenizer", processor) for processor in processors]
    return next((c for c in candidates if hasattr(c, "convert_ids_to_tokens")), None)


def add_tokenizer(writer: Any, tokenizer: Any, vocab_size: int) -> None:
    """Write the tokenizer; without one the file takes and gives token ids.

    Raises:
        ValueError: It is not a byte-level BPE tokenizer with rules that llama.cpp has, or has too many tokens.
    """
    if tokenizer is None:
        writer.add_tokenizer_model("none")
        return
    content = _content(tokenizer)
    pre = _rules(content)
    vocab = dict(content["model"]["vocab"])
    added = {entry["content"]: entry for entry in content.get("added_tokens", ())}
    vocab |= {text: entry["id"] for text, entry in added.items()}
    if vocab and max(vocab.values()) >= vocab_size:
        raise ValueError(f"the tokenizer has {max(vocab.values()) + 1} tokens, and the model {vocab_size}")
    by_id = {number: text for text, number in vocab.items()}
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([_type(text, number in by_id, added) for number, text in enumerate(tokens)])
    merges = content["model"]["merges"]
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    ids = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "unk", "pad")}
    for name, number in ids.items():
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    first = tokenizer("a")["input_ids"][:1]
    writer.add_add_bos_token(ids["bos"] is not None and first == [ids["bos"]])
    if isinstance(template := getattr(tokenizer, "chat_template", None), str):
        writer.add_chat_template(template)


def _content(tokenizer: Any) -> dict[str, Any]:
    """tokenizer.json."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {}
    kind = content.get("model", {}).get("type")
    if kind != "BPE":
        raise ValueError(
            f"a {type(tokenizer).__name__} with a model of type {kind!r} is not written to GGUF, only byte-level BPE; "
            f"leave the tokenizer out, and the file takes token ids"
        )
    return content


def _rules(content: Mapping[str, Any]) -> str:
    """The name of the rules in llama.cpp."""
    step = content.get("pre_tokenizer") or {}
    steps = step["pretokenizers"] if step.get("type") == "Sequence" else [step]
    names = tuple(s["pattern"].get("Regex", "") if s.get("type") == "Split" else str(s.get("type")) for s in steps)
    if names not in RULES:
        raise ValueError(
            f"the pre-tokenizer {names} of the tokenizer is not one of those that are known to llama.cpp by the names "
            f"{', '.join(RULES.values())}; leave the tokenizer out, and the file takes token ids"
        )
    return RULES[names]


def _type(text: str, used: bool, added: Mapping[str, Mapping[str, Any]]) -> int:
    from gguf import TokenType

    if not used:
        return int(TokenType.UNUSED)
    if text not in added:
        return int(TokenType.NORMAL)
    return int(TokenType.CONTROL if added[text]["special"] else TokenType.USER_DEFINED)
