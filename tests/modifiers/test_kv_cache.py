"""Scales of a KV cache from calibration data, and recipes that are refused."""

import pytest
import torch
from torch.testing import assert_close

from lightning_compress.core import Lifecycle, State
from lightning_compress.modifiers.kv_cache import KVCacheModifier
from lightning_compress.oneshot import compress
from lightning_compress.quant.kv_cache import QuantizedCache, attention_modules
from tests.support.architecture_models import ARCHITECTURES
from tests.support.kv_caches import IDS, keys_and_values, quantized, shifted


@pytest.mark.parametrize("strategy", ["tensor", "head", "token"])
def test_zero_points_lose_less_where_values_do_not_lie_around_zero(tiny_llama, strategy):
    dense = keys_and_values(shifted(tiny_llama()))[1]
    error = {
        symmetric: float((keys_and_values(model)[1] - dense).square().mean())
        for symmetric in (True, False)
        for model in [quantized(shifted(tiny_llama()), False, format="int4", strategy=strategy, symmetric=symmetric)]
    }
    assert error[False] < 0.5 * error[True]


def test_padding_does_not_stretch_scales(tiny_llama):
    whole, padded = tiny_llama(), tiny_llama()
    compress(whole, KVCacheModifier(), [{"input_ids": IDS[:1]}])
    mask = torch.ones_like(IDS)
    mask[1] = 0
    compress(padded, KVCacheModifier(), [{"input_ids": IDS, "attention_mask": mask}])
    for name, module in attention_modules(whole).items():
        assert_close(QuantizedCache.of(padded.get_submodule(name)).k_scale, QuantizedCache.of(module).k_scale)


def test_the_ledger_says_it(tiny_llama):
    for arguments, scheme in (({}, "KV FP8 head"), ({"format": "int8", "symmetric": False}, "KV INT8 head asymmetric")):
        ledger = compress(tiny_llama(), KVCacheModifier(strategy="head", **arguments), [{"input_ids": IDS}])
        assert [(r.module, r.scheme) for r in ledger] == [(f"model.layers.{i}.self_attn", scheme) for i in range(2)]


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_encoder_decoders_are_refused_by_name(name):
    model = ARCHITECTURES[name].build()
    message = rf"{type(model).__name__} is an encoder-decoder, .* fails at its first call\. Leave the KV cache out"
    with pytest.raises(ValueError, match=message):
        Lifecycle([KVCacheModifier()]).initialize(State(model=model))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "fp4"}, "format='fp4': Input should be 'fp8', 'int8' or 'int4'"),
        ({"strategy": "channel"}, "strategy"),
        ({"symmetric": False}, "format='fp8' with symmetric=False: floating-point codes have no zero point"),
        ({"targets": ["Linear"]}, "unknown argument 'targets'"),
    ],
)
def test_arguments_that_do_not_work(arguments, message):
    with pytest.raises(ValueError, match=message):
        KVCacheModifier(**arguments)
