"""Pairs are found in models of many architectures, without a table, and only those that leave the model as it was."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import SmoothQuantModifier, compress
from lightning_compress.modifiers.smoothing.finder import PairFinder
from lightning_compress.modifiers.smoothing.fold import change_by_folding, fold
from lightning_compress.modifiers.smoothing.mappings import parse
from lightning_compress.modifiers.smoothing.pair import Consumer, Pair
from tests.support.smoothing_models import FF, NAMES, C, Plain, batches, build, change, output

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


def found(name_or_model, data, targets=None, mappings=None):
    """Pairs of a model as one block, and its modules."""
    model = build(name_or_model) if isinstance(name_or_model, str) else name_or_model
    modules = {name: module for name, module in model.named_modules() if name}
    layers = {n: m for n, m in modules.items() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
    chosen = {n: m for n, m in layers.items() if "head" not in n and n != "classifier"} if targets is None else targets
    finder = PairFinder(model, chosen, None if mappings is None else parse(mappings))
    with torch.no_grad():
        return model, modules, finder.pairs("", modules, lambda i: replay(model, data[i]))


def replay(model, batch):
    return model(**batch) if isinstance(batch, dict) else model(batch)


def last(name):
    return name.rsplit(".", 1)[-1]


@pytest.mark.parametrize("name", EXPECTED)
def test_every_block_has_the_pairs_of_its_architecture(name):
    _, _, pairs = found(name, batches(name))
    by_block: dict[str, dict[str, set[str]]] = {}
    for pair in pairs:
        block = "" if name == "flat" else next((part for part in pair.source.split(".") if part.isdecimal()), "")
        if not all(block in consumer.split(".") or not block for consumer in pair.consumers) or "cls" in pair.source:
            continue  # the head of BertForMaskedLM
        by_block.setdefault(block, {})[last(pair.source)] = {last(consumer) for consumer in pair.consumers}
    assert list(by_block.values()) == [EXPECTED[name]] * (1 if name == "flat" else 2)


@pytest.mark.parametrize("name", NAMES)
def test_folding_random_scales_changes_nothing(name):
    """Also with scales that are no powers of two, and on data that the finder has not seen."""
    data = batches(name)
    model, modules, pairs = found(name, data)
    dense = copy.deepcopy(model)
    assert pairs
    for pair in pairs:
        fold(pair, modules, 0.2 + 4 * torch.rand(len(pair.channels_J), generator=torch.Generator().manual_seed(1)))
    for batch in [*data, *batches(name, seed=7)]:
        before, after = output(dense, batch), output(model, batch)
        assert float((after - before).norm() / before.norm()) < 1e-5
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, dense.get_parameter(n))}
    named = {name for pair in pairs for name in [pair.source, *pair.consumers]}
    assert {n.rpartition(".")[0] for n in changed} == named


def test_experts_without_a_token_and_the_router_are_scaled_with_the_others():
    data = batches("mixture")
    model, modules, pairs = found("mixture", [data[0][:1, :2], *data])  # two tokens: two experts at most
    first = next(pair for pair in pairs if pair.source == "0.norm")
    experts = {f"0.mixture.experts.{i}.{part}" for i in range(4) for part in ("gate", "up")}
    assert set(first.consumers) == experts | {"0.mixture.router"}
    dense = copy.deepcopy(model)
    for pair in pairs:
        fold(pair, modules, 0.5 + torch.rand(len(pair.channels_J)))
    for batch in data:
        assert torch.allclose(output(model, batch), output(dense, batch), atol=1e-5)


def test_heads_of_gqa_share_a_scale():
    _, modules, pairs = found("llama", batches("llama"))
    pair = next(pair for pair in pairs if pair.source.endswith("0.self_attn.v_proj"))
    (consumer,) = pair.consumers.values()
    assert modules[pair.source].out_features == len(pair.channels_J) == C // 2
    heads = consumer.index_C.view(2, 2, 8)  # [kv head, repeats, head size]
    assert torch.equal(heads[:, 0], heads[:, 1])
    assert torch.equal(heads[:, 0].flatten(), torch.arange(C // 2))


@pytest.mark.parametrize(("name", "source", "channels"), [
    ("gpt2", "transformer.h.0.attn.c_attn", range(2 * C, 3 * C)),
    ("phi3", "model.layers.0.self_attn.qkv_proj", range(C + C // 2, 2 * C)),
    ("phi3", "model.layers.0.mlp.gate_up_proj", range(FF, 2 * FF)),
    ("neox", "gpt_neox.layers.1.attention.query_key_value", [24 * h + 16 + i for h in range(4) for i in range(8)]),
])  # fmt: skip
def test_only_the_values_of_a_fused_layer_are_scaled(name, source, channels):
    _, _, pairs = found(name, batches(name))
    assert next(pair for pair in pairs if pair.source == source).channels_J.tolist() == list(channels)


@pytest.mark.parametrize(("name", "dtype"), [
    ("gemma3", torch.bfloat16), ("llama", torch.float16), ("opt", torch.bfloat16), ("mixture", torch.float64)
], ids=str)  # fmt: skip
def test_the_same_pairs_are_found_in_any_dtype(name, dtype):
    data = batches(name)
    _, _, expected = found(name, data)
    cast = [b if isinstance(b, dict) else b.to(dtype) for b in data]
    _, _, pairs = found(build(name, dtype), cast)
    assert [(p.source, set(p.consumers)) for p in pairs] == [(p.source, set(p.consumers)) for p in expected]


class Leaky(nn.Module):
    """The norm feeds the linear layer, and something else."""

    def __init__(self, how: str):
        super().__init__()
        self.norm, self.fc, self.how = nn.LayerNorm(C), nn.Linear(C, C), how
        self.other = nn.Parameter(torch.randn(C))
        self.register_buffer("table", torch.randn(C, C))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        extra = {"residual": h, "buffer": h @ self.table, "parameter": h * self.other, "gate": torch.sigmoid(h)}
        return self.fc(h) + extra[self.how]


@pytest.mark.parametrize("how", ["residual", "buffer", "parameter", "gate"])
def test_a_norm_that_feeds_something_else_is_no_source(how):
    torch.manual_seed(0)
    _, _, pairs = found(Leaky(how).eval(), batches("flat"))
    assert pairs == []


def test_a_leak_far_below_the_residual_is_seen():
    """1e6 times the branch: the block's output alone would hide it."""

    class Hidden(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return 1e6 * x + super().forward(x) + 1e-3 * self.act(self.norm(x))

    _, _, pairs = found(nn.Sequential(Hidden(nn.GELU()), Hidden(nn.GELU())).eval(), batches("flat"))
    assert pairs == []


def test_a_layer_that_runs_twice_and_tied_weights_are_left_alone():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a, self.b = nn.LayerNorm(C), nn.Linear(C, C), nn.Linear(C, C)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(self.norm(x)) + self.b(self.norm(x + 1))

    assert found(Twice().eval(), batches("flat"))[2] == []
    tied = nn.Sequential(nn.LayerNorm(C), nn.Linear(C, C), nn.LayerNorm(C), nn.Linear(C, C)).eval()
    tied[3].weight = tied[1].weight
    assert found(tied, batches("flat"))[2] == []


def test_units_that_are_always_zero_follow_the_pattern_of_the_others():
    model = build("flat")
    model[1].bias.data[5] = -1e3  # never fires
    dense = copy.deepcopy(model)
    _, modules, pairs = found(model, batches("flat"))
    pair = next(pair for pair in pairs if pair.source == "1")
    assert len(pair.channels_J) == FF
    fold(pair, modules, torch.full((FF,), 3.0))
    dense[1].bias.data[5] = model[1].bias.data[5] = 0.0  # on other data it may
    x = torch.randn(4, C)
    assert torch.allclose(model(x), dense(x), atol=1e-5)


def test_the_second_block_costs_two_runs():
    """What the first block taught is only checked."""
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


def test_a_block_that_only_looks_like_the_one_before_is_looked_at_anew():
    model = nn.Sequential(Plain(nn.ReLU()), Plain(nn.GELU())).eval()  # activations have no parameters
    finder = PairFinder(model, {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)})
    x = batches("relu")[0]
    sources = []
    for name, block in model.named_children():
        modules = {name: block, **{f"{name}.{n}": m for n, m in block.named_modules() if n}}
        with torch.no_grad():
            sources.append([p.source for p in finder.pairs(name, modules, lambda i, b=block: b(x))])
    assert sources == [["0.norm", "0.fc1"], ["1.norm"]]


def test_the_check_sees_a_wrong_pair_and_puts_the_weights_back():
    model, modules, pairs = found("gelu", batches("gelu"))
    dense = copy.deepcopy(model)
    index_C = torch.where(torch.arange(FF) < C, torch.arange(FF), -1)
    wrong = Pair("0.fc1", "rows", torch.arange(C), {"0.fc2": Consumer({"weight": 1}, index_C)})  # over a GELU
    x = batches("gelu")[0]
    with torch.no_grad():
        assert change_by_folding(pairs, modules, lambda: model(x), torch.Generator()) < 1e-6
        assert change_by_folding([wrong], modules, lambda: model(x), torch.Generator()) > 1e-3
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), dense.parameters(), strict=True))


# -- by hand ----------------------------------------------------------------------------------------------------------


def test_pairs_by_hand_are_taken_and_completed():
    """k_proj and v_proj are fed too: they must be scaled as well, whoever was named."""
    mapping = {"smooth_layer": "re:.*input_layernorm", "balance_layers": ["re:.*q_proj"]}
    _, _, pairs = found("llama", batches("llama"), mappings=[mapping])
    assert [last(pair.source) for pair in pairs] == ["input_layernorm"] * 2
    assert {last(n) for n in pairs[0].consumers} == {"q_proj", "k_proj", "v_proj"}


def test_experts_get_their_own_source():
    mapping = [["re:.*experts.*down"], "re:.*experts.*up"]
    _, _, pairs = found("mixture", batches("mixture"), mappings=[mapping])
    assert pairs
    assert all(list(p.consumers) == [p.source.replace("up", "down")] for p in pairs)


@pytest.mark.parametrize(("source", "consumers", "why"), [
    ("re:.*fc1", ["re:.*fc2"], "cannot make up for a scale"),
    ("re:.*norm", ["re:.*fc2"], "does not feed .'0.fc2'."),
    ("re:.*act", ["re:.*fc2"], "no norm or linear layer that runs once"),
])  # fmt: skip
def test_a_smoothing_pair_that_is_not_invariant(source, consumers, why):
    mapping = {"smooth_layer": source, "balance_layers": consumers}
    with pytest.raises(ValueError, match=f"a smoothing pair that is not invariant: '0.*{why}"):
        found("gelu", batches("gelu"), mappings=[mapping])


@pytest.mark.parametrize(("entry", "message"), [
    ("fc1", "expected"),
    ({"smooth_layer": "fc1"}, "balance_layers"),
    ({"smooth_layer": "fc1", "balance_layers": []}, "expected"),
    ({"smooth_layer": "fc1", "balance_layer": ["fc2"]}, "expected"),
    ([["fc2"], "re:("], "not a valid regular expression"),
])  # fmt: skip
def test_a_mapping_that_is_none(entry, message):
    with pytest.raises(ValueError, match=r"mappings\[0\].*" + message):
        parse([entry])


# -- models as they come ----------------------------------------------------------------------------------------------


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
