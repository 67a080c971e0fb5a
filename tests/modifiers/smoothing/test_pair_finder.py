"""Pairs are found in models of many architectures, without a table, and only those that leave the model as it was."""

import copy

import pytest
import torch
from torch import nn

from lightning_compress import SmoothQuantModifier, compress
from lightning_compress.modifiers.smoothing.pair_finder import PairFinder
from tests.support.smoothing_models import FF, C, Plain, batches, build, change, find_pairs

NORM_FED = {"input_layernorm": {"q_proj", "k_proj", "v_proj"}, "post_attention_layernorm": {"gate_proj", "up_proj"}}


LLAMA = NORM_FED | {"v_proj": {"o_proj"}, "up_proj": {"down_proj"}}


EXPECTED: dict[str, dict[str, set[str]]] = {
    "llama": LLAMA,
    "gemma3": {
        "input_layernorm": {"q_proj", "k_proj", "v_proj"},
        "pre_feedforward_layernorm": {"gate_proj", "up_proj"},
        "v_proj": {"o_proj"},
        "up_proj": {"down_proj"},
    },
    "phi3": {
        "input_layernorm": {"qkv_proj"},
        "qkv_proj": {"o_proj"},
        "post_attention_layernorm": {"gate_up_proj"},
        "gate_up_proj": {"down_proj"},
    },
    "neox": {
        "input_layernorm": {"query_key_value"},
        "query_key_value": {"dense"},
        "post_attention_layernorm": {"dense_h_to_4h"},
    },
    "gpt2": {"ln_1": {"c_attn"}, "c_attn": {"c_proj"}, "ln_2": {"c_fc"}},
    "opt": {
        "self_attn_layer_norm": {"q_proj", "k_proj", "v_proj"},
        "v_proj": {"out_proj"},
        "final_layer_norm": {"fc1"},
        "fc1": {"fc2"},
    },
    "bert": {"value": {"dense"}},
    "mixtral": {"input_layernorm": {"q_proj", "k_proj", "v_proj"}, "v_proj": {"o_proj"}},
    "vit": {"layernorm_before": {"q_proj", "k_proj", "v_proj"}, "v_proj": {"o_proj"}, "layernorm_after": {"fc1"}},
    "relu": {"norm": {"fc1"}, "fc1": {"fc2"}},
    "gelu": {"norm": {"fc1"}},
    "flat": {"0": {"1"}, "1": {"3"}},
}


def last(name):
    return name.rsplit(".", 1)[-1]


@pytest.mark.parametrize("name", EXPECTED)
def test_every_block_has_the_pairs_of_its_architecture(name):
    _, _, pairs = find_pairs(name, batches(name))
    by_block: dict[str, dict[str, set[str]]] = {}
    for pair in pairs:
        block = "" if name == "flat" else next((part for part in pair.source.split(".") if part.isdecimal()), "")
        if not all(block in consumer.split(".") or not block for consumer in pair.consumers) or "cls" in pair.source:
            continue  # the head of BertForMaskedLM
        by_block.setdefault(block, {})[last(pair.source)] = {last(consumer) for consumer in pair.consumers}
    assert list(by_block.values()) == [EXPECTED[name]] * (1 if name == "flat" else 2)


@pytest.mark.parametrize(("name", "dtype"), [
    ("gemma3", torch.bfloat16), ("llama", torch.float16), ("opt", torch.bfloat16), ("mixture", torch.float64)
], ids=str)  # fmt: skip
def test_the_same_pairs_are_found_in_any_dtype(name, dtype):
    data = batches(name)
    _, _, expected = find_pairs(name, data)
    cast = [b if isinstance(b, dict) else b.to(dtype) for b in data]
    _, _, pairs = find_pairs(build(name, dtype), cast)
    assert [(p.source, set(p.consumers)) for p in pairs] == [(p.source, set(p.consumers)) for p in expected]


def test_the_second_block_costs_two_runs():
    """The pairs of the first block are only checked."""
    model = build("relu")
    finder = PairFinder(model, {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)})
    runs = {"0": 0, "1": 0}
    x = batches("relu")[0]

    def counted(name):
        def run(i):
            runs[name] += 1
            return model[int(name)](x.clone())

        return run

    pairs = {}
    for name in runs:
        modules = {name: model[int(name)], **{f"{name}.{n}": m for n, m in model[int(name)].named_modules() if n}}
        with torch.no_grad():
            pairs[name] = finder.pairs(name, modules, counted(name))
    assert [p.renamed(lambda n: "1" + n[1:]).source for p in pairs["0"]] == [p.source for p in pairs["1"]]
    assert runs["0"] > 5
    assert runs["1"] == 2


def test_a_block_of_the_same_parameters_with_other_pairs_is_searched():
    model = nn.Sequential(Plain(nn.ReLU()), Plain(nn.GELU())).eval()  # activations have no parameters
    finder = PairFinder(model, {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)})
    x = batches("relu")[0]
    sources = []
    for name, block in model.named_children():
        modules = {name: block, **{f"{name}.{n}": m for n, m in block.named_modules() if n}}
        with torch.no_grad():
            sources.append([p.source for p in finder.pairs(name, modules, lambda i, b=block: b(x))])
    assert sources == [["0.norm", "0.fc1"], ["1.norm"]]


def test_pairs_by_hand_are_completed():
    """k_proj and v_proj have the same source as q_proj, so that they must be scaled, too."""
    mapping = {"smooth_layer": "re:.*input_layernorm", "balance_layers": ["re:.*q_proj"]}
    _, _, pairs = find_pairs("llama", batches("llama"), mappings=[mapping])
    assert [last(pair.source) for pair in pairs] == ["input_layernorm"] * 2
    assert {last(n) for n in pairs[0].consumers} == {"q_proj", "k_proj", "v_proj"}


def test_experts_get_their_own_source():
    mapping = [["re:.*experts.*down"], "re:.*experts.*up"]
    _, _, pairs = find_pairs("mixture", batches("mixture"), mappings=[mapping])
    assert pairs
    assert all(list(p.consumers) == [p.source.replace("up", "down")] for p in pairs)


@pytest.mark.parametrize(("source", "consumers", "why"), [
    ("re:.*fc1", ["re:.*fc2"], "a scale cannot be undone in what it feeds"),
    ("re:.*norm", ["re:.*fc2"], "does not feed .'0.fc2'."),
    ("re:.*act", ["re:.*fc2"], "it is not a norm or linear layer that runs once"),
])  # fmt: skip
def test_a_smoothing_pair_that_is_not_invariant(source, consumers, why):
    mapping = {"smooth_layer": source, "balance_layers": consumers}
    with pytest.raises(ValueError, match=f"a smoothing pair that is not invariant: '0.*{why}"):
        find_pairs("gelu", batches("gelu"), mappings=[mapping])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["compiled", "encoder", "bfloat16"])
def test_the_walk_smooths(kind):
    """A compiled block; torch's encoder, whose attention uses weights without calling their modules; 1 + w in bf16."""
    torch.manual_seed(0)
    if kind == "encoder":
        layer = nn.TransformerEncoderLayer(C, 4, FF, batch_first=True, norm_first=True)
        model, data = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), batches("flat")
        expected = {f"layers.{i}.linear{n}" for i in range(2) for n in (1, 2)}
        options = {"ignore": ["re:.*out_proj"]}
    else:
        dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
        model, data = build("gemma3" if kind == "bfloat16" else "llama", dtype), batches("llama")
        expected = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
        options = {"ignore": ["lm_head"]}
    dense = copy.deepcopy(model)
    if kind == "compiled":
        model.model.layers[0] = torch.compile(model.model.layers[0])
    ledger = compress(model, SmoothQuantModifier(**options), data)
    assert {row.module for row in ledger if not row.flags} == expected
    assert change(model, dense, data) < (0.05 if kind == "bfloat16" else 1e-5)
