"""Bytes on disk and errors of a quantized weight, for the ledger."""

import torch
from compressed_tensors.quantization import preset_name_to_scheme
from torch.testing import assert_close

from lightning_compress.quant.record import Quantized
from lightning_compress.quant.weight_metrics import stored_bytes, weight_facts

W8A8, FP8 = (preset_name_to_scheme(name, ["Linear"]) for name in ("W8A8", "FP8"))


def test_bytes_are_those_that_compressed_tensors_writes():
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    for bits in (2, 3, 4, 8):
        scheme = preset_name_to_scheme(f"W{bits}A16", ["Linear"])
        codes = torch.zeros(6, 52, dtype=torch.int8)
        packed = pack_to_int32(codes, bits)
        record = Quantized(scheme, torch.ones(6, 1))
        assert stored_bytes(record, 6, 52) == packed.numel() * 4 + 6 * 4 + 16
    zero = torch.zeros(6, 2, dtype=torch.int8)
    asym = Quantized(preset_name_to_scheme("W4A16_ASYM", ["Linear"]), torch.ones(6, 2).bfloat16(), zero)
    assert stored_bytes(asym, 6, 256) == 6 * 128 + 16 + 24 + pack_to_int32(zero, 4, 0).numel() * 4
    assert stored_bytes(Quantized(W8A8, torch.ones(6, 1)), 6, 50) == 300 + 24
    assert stored_bytes(Quantized(FP8, torch.ones(1), input_scale=torch.ones(1)), 6, 50) == 308


def test_facts_by_hand():
    W, Q = torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 3.5]])
    facts = weight_facts(W, Q, Quantized(W8A8, torch.ones(1, 1)))
    assert_close(torch.tensor(facts["sqnr_db"]), 10 * torch.log10(torch.tensor(25 / 0.25)))
    assert (facts["params"], facts["bytes_before"], facts["bytes_after"], facts["bits"]) == (2, 8, 6, 24)
    assert weight_facts(W, W, Quantized(W8A8, torch.ones(1, 1)))["sqnr_db"] is None
