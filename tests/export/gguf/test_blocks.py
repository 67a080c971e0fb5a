"""Blocks of codes against the reader of the package gguf, an independent implementation of the layouts."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from lightning_compress.export.gguf.blocks import block_scales, q4_0, q8_0

R, C = 3, 128


@pytest.mark.parametrize(
    ("encode", "type_", "low", "high"),
    [(q4_0, GGMLQuantizationType.Q4_0, -8, 7), (q8_0, GGMLQuantizationType.Q8_0, -128, 127)],
    ids=["q4_0", "q8_0"],
)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_the_bytes_are_the_codes_times_the_scales(encode, type_, low, high, group):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(low, high + 1, (R, C), generator=generator, dtype=torch.int8)
    codes[0, :2] = torch.tensor([low, high])
    scale = (torch.rand(R, C // group, generator=generator) + 0.01).to(torch.bfloat16)
    d, rounded, difference = block_scales(scale, C)
    assert (d.shape, rounded, difference) == ((R, C // 32), 0, 0.0)
    values = quants.dequantize(encode(codes, d).numpy(), type_)
    expected = codes.numpy().astype(np.float32) * scale.float().repeat_interleave(group, 1).numpy()
    np.testing.assert_array_equal(values, expected)


def test_scales_that_float16_does_not_hold_are_counted():
    scale = torch.tensor([[1.0, 1 + 2**-12, 2.0**-26, 3 * 2.0**-25]], dtype=torch.float32)
    d, rounded, difference = block_scales(scale, 128)
    assert d.tolist() == [[1.0, 1.0, 0.0, 2.0**-23]]
    assert (rounded, difference) == (3, 1.0)
