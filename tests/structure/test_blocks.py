"""What hangs together in transformer blocks: neurons of MLPs, heads with their queries."""

import torch
from torch.testing import assert_close

from lightning_compress.core import Lifecycle, State
from lightning_compress.modifiers.structured.modifier import StructuredPruningModifier
from tests.support.structure_runs import llama, silenced, tokens


def initialized(model, *modifiers):
    """The lifecycle at the end of set-up, as compress() and the callback begin."""
    lifecycle = Lifecycle(modifiers)
    lifecycle.initialize(State(model=model))
    return lifecycle


def test_mlps_lose_their_weakest_neurons_and_compute_as_if_those_were_zero():
    model, dense = llama(), llama()
    initialized(model, StructuredPruningModifier(dimension="mlp", ratio=0.25, start=0))
    zeroed = {}
    for name, mlp in dense.named_modules():
        if type(mlp).__name__ == "LlamaMLP":
            parts = [mlp.gate_proj.weight.square().sum(1), mlp.up_proj.weight.square().sum(1)]
            weakest = sum(parts, mlp.down_proj.weight.square().sum(0)).argsort()[:12]
            zeroed[f"{name}.down_proj"] = lambda x, weakest=weakest: x.index_fill(-1, weakest, 0.0)
            small = model.get_submodule(name)
            assert (small.gate_proj.out_features, small.up_proj.out_features, small.down_proj.in_features) == (36,) * 3
    silenced(dense, zeroed)
    assert len(zeroed) == 3
    assert model.config.intermediate_size == 36
    assert_close(model(**tokens()).logits, dense(**tokens()).logits)


def test_heads_go_in_groups_and_the_rest_computes_as_if_those_were_zero():
    model, dense = llama(), llama()
    initialized(model, StructuredPruningModifier(dimension="heads", ratio=0.5, start=0))
    zeroed = {}
    for name, attention in dense.named_modules():
        if type(attention).__name__ == "LlamaAttention":
            makers = [getattr(attention, f"{p}_proj").weight.view(4, -1).square().sum(1) for p in "qkv"]
            columns = attention.o_proj.weight.t().reshape(4, -1).square().sum(1)
            weakest = sum(makers, columns).argsort()[:2]
            places = torch.cat([torch.arange(8) + 8 * int(g) for g in weakest])  # 2 query heads of 4 in each group
            zeroed[f"{name}.o_proj"] = lambda x, places=places: x.index_fill(-1, places, 0.0)
    silenced(dense, zeroed)
    assert (model.config.num_attention_heads, model.config.num_key_value_heads, model.config.head_dim) == (4, 2, 4)
    assert model.model.layers[0].self_attn.q_proj.weight.shape == (16, 32)
    assert_close(model(**tokens()).logits, dense(**tokens()).logits)
    with torch.no_grad():
        generated = model.generate(**tokens(count=1), max_new_tokens=4, do_sample=False, use_cache=True)
        plain = model.generate(**tokens(count=1), max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(generated, plain)


def test_mlps_and_heads_stack():
    model = llama()
    modifiers = [StructuredPruningModifier(dimension=d, ratio=r, start=0) for d, r in (("mlp", 0.5), ("heads", 0.25))]
    initialized(model, *modifiers)
    rebuilt = type(model)(model.config).eval()
    rebuilt.load_state_dict(model.state_dict())
    assert_close(rebuilt(**tokens()).logits, model(**tokens()).logits)
