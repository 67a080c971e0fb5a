"""Keys and values on their grids where they enter the cache."""

import copy

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.lifecycle.initialize import is_cached_attention_module
from torch import nn
from torch.testing import assert_close

from lightning_compress.core import Lifecycle, State
from lightning_compress.modifiers.kv_cache import KVCacheModifier
from lightning_compress.quant import kv_cache
from lightning_compress.quant.kv_cache import QuantizedCache, attention_modules
from tests.support.architecture_models import ARCHITECTURES
from tests.support.kv_caches import IDS, keys_and_values, logits, quantized, shifted


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("strategy", ["tensor", "head", "token"])
def test_the_grid_by_its_definition(tiny_llama, strategy, symmetric):
    model = shifted(tiny_llama())
    dense = keys_and_values(model)
    found = keys_and_values(quantized(model, False, format="int4", strategy=strategy, symmetric=symmetric))
    over = {"tensor": (0, 1, 2, 3), "head": (0, 2, 3), "token": (3,)}[strategy]
    for x, q in zip(dense, found, strict=True):
        low, high = x.amin(over, keepdim=True).clamp_max(0), x.amax(over, keepdim=True).clamp_min(0)
        scale = (high - low) / 15 if not symmetric else torch.maximum(-low, high) / 7.5
        zero = 0 if symmetric else (-8 - low / scale).round()
        assert_close(q, ((x / scale + zero).round().clamp(-8, 7) - zero) * scale)


def test_decoding_with_a_cache_gives_what_one_pass_gives(tiny_llama):
    model = quantized(tiny_llama(), False, strategy="head")
    whole = logits(model)
    with torch.no_grad():
        first = model(input_ids=IDS[:, :7], use_cache=True)
        rest = model(input_ids=IDS[:, 7:], past_key_values=first.past_key_values, use_cache=True)
    assert_close(torch.cat([first.logits, rest.logits], 1), whole, rtol=0, atol=1e-5)
    assert model.generate(IDS, max_new_tokens=3, do_sample=False).shape == (2, 15)


@pytest.mark.parametrize("strategy", ["tensor", "head", "token"])
def test_gradients_pass_the_rounding_of_keys_and_values_straight_through(tiny_llama, strategy, monkeypatch):
    model = quantized(tiny_llama(num_hidden_layers=1), False, format="int8", strategy=strategy)

    def gradients():
        model.zero_grad()
        model(input_ids=IDS).logits.sin().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    mine, fake_quantize_input = gradients(), kv_cache.fake_quantize_input

    def straight(module, x, *grid):
        return x + (fake_quantize_input(module, x.detach(), *grid) - x).detach()

    monkeypatch.setattr(kv_cache, "fake_quantize_input", straight)
    expected = gradients()
    assert mine.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name, gradient in expected.items():
        assert_close(mine[name], gradient, rtol=1e-3, atol=1e-5)


def test_a_copy_keeps_it_and_detach_takes_it_off(tiny_llama):
    model = quantized(tiny_llama(), False)
    assert list(model.state_dict()) == list(tiny_llama().state_dict())
    other = copy.deepcopy(model)
    assert_close(logits(other), logits(model), rtol=0, atol=0)
    for module in attention_modules(other).values():
        QuantizedCache.detach(module)
    assert_close(logits(other), logits(tiny_llama()), rtol=0, atol=0)


def test_models_without_such_attention():
    with pytest.raises(ValueError, match="this Sequential has no attention module whose keys and values can be quant"):
        Lifecycle([KVCacheModifier()]).initialize(State(model=nn.Sequential(nn.Linear(4, 4))))
    with pytest.raises(ValueError, match="this GPT2LMHeadModel has no attention module whose keys and values can be q"):
        Lifecycle([KVCacheModifier()]).initialize(State(model=ARCHITECTURES["gpt2"].build()))


def test_what_loaders_do_with_an_encoder_decoder():
    """The reason of the refusal: what stands in the place of an EncoderDecoderCache cannot take keys."""
    model, scheme = ARCHITECTURES["bart"].build(), QuantizationArgs(num_bits=8)
    model.config.num_key_value_heads = 4
    if not any(is_cached_attention_module(module) for module in model.modules()):
        pytest.skip("this transformers hides its caches from compressed-tensors")
    apply_quantization_config(model, QuantizationConfig(config_groups={}, kv_cache_scheme=scheme))
    with pytest.raises(AttributeError, match="EncoderDecoderCache"):
        model(input_ids=IDS, decoder_input_ids=IDS)
    t5 = ARCHITECTURES["t5"].build()
    assert not attention_modules(t5)  # its projections have other names: nothing is quantized
