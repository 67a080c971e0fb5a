"""Which fields of a config state a size, and whether the config can state all shapes after a cut."""

from types import SimpleNamespace

import pytest

from lightning_compress.structure.config import check_states, head_fields, is_transformers, layer_fields, mlp_fields
from tests.support.structure_runs import llama


def test_fields_by_hand():
    config = SimpleNamespace(intermediate_size=48, ffn_dim=12, num_hidden_layers=4, layer_types=["a", "b", "a", "b"])
    assert mlp_fields(config, 48, 36) == {"intermediate_size": 36}
    assert layer_fields(config, 4, [0, 3]) == {"num_hidden_layers": 2, "layer_types": ["a", "b"]}
    assert mlp_fields(SimpleNamespace(n_inner=None), 48, 36) == {"n_inner": 36}  # GPT-2
    heads = SimpleNamespace(num_attention_heads=8, num_key_value_heads=4)
    assert head_fields(heads, 4, 3, 16) == {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16}
    assert head_fields(SimpleNamespace(), 4, 3, 16) == {}


def test_a_config_must_give_every_shape():
    model = llama()
    smaller = llama(intermediate_size=36)
    shapes = {name: list(p.shape) for name, p in smaller.named_parameters()}
    check_states(model, {"intermediate_size": 36}, shapes, "advice")
    assert model.config.intermediate_size == 48
    with pytest.raises(ValueError, match=r"gate_proj.weight' would be \[36, 32\], and .* makes it \[40, 32\]; advice"):
        check_states(model, {"intermediate_size": 40}, shapes, "advice")
    with pytest.raises(ValueError, match=r"the config of LlamaForCausalLM cannot state the sizes .* advice"):
        check_states(model, {"hidden_act": "nothing"}, shapes, "advice")
    assert is_transformers(model)
