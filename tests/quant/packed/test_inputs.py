"""Codes of inputs times their scales are the values that a dense layer gets."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import nn
from torch.testing import assert_close

from lightning_compress.quant.fake_quant import fake_quantize_input
from lightning_compress.quant.packed.inputs import input_codes
from tests.support.packed_linears import INPUTS


@pytest.mark.parametrize("shape", [(3, 64), (2, 5, 64)], ids=str)
@pytest.mark.parametrize("name", INPUTS)
def test_codes_stand_for_the_values_of_fake_quantization(name, shape):
    args, x = QuantizationArgs(num_bits=8, **INPUTS[name]), torch.randn(shape) + 0.3
    scale = zero = None
    if not args.dynamic:
        scale, zero = torch.tensor([0.03]), None if args.symmetric else torch.tensor([-7], dtype=torch.int8)
    codes, scales, zeros = input_codes(x, args, scale, zero)
    assert codes.dtype == torch.int8
    assert (zeros is None) == args.symmetric
    values = (codes.float() - (0 if zeros is None else zeros.float())) * scales
    assert_close(values, fake_quantize_input(nn.Linear(64, 1), x, args, scale, zero), rtol=1e-5, atol=1e-6)
