import pytest
import torch
from torch import nn

from lightning_compress.layers.matrix import as_matrix
from lightning_compress.modifiers import QuantizationModifier
from lightning_compress.oneshot import compress
from lightning_compress.planning.sizes import dense_reasons, model_bytes, packed_bytes
from lightning_compress.quant.packing import pack
from lightning_compress.quant.record import Quantized

CASES = [
    *({"scheme": name} for name in ("W8A16", "W8A8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "MXFP4A16")),
    *({"scheme": name, "group_size": 32} for name in ("W4A16", "W4A16_ASYM")),
    *({"scheme": {"weights": {"num_bits": bits, "group_size": size}}} for bits, size in ((3, 64), (2, -1))),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arguments", CASES, ids=str)
def test_the_bytes_of_a_packed_weight_are_those_of_its_tensors(arguments, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 48)).to(dtype)
    compress(model, QuantizationModifier(**arguments))
    record = Quantized.of(model[0])
    stored = sum(tensor.nbytes for tensor in pack("0", model[0], record).values())
    assert packed_bytes(nn.Linear(128, 48, device="meta", dtype=dtype), record.scheme) == stored
    assert as_matrix(model[0]).shape == (48, 128)


def test_the_bytes_of_a_model_count_a_tied_weight_once():
    model = nn.ModuleDict({"a": nn.Embedding(10, 4), "b": nn.Linear(4, 10, bias=False)})
    model["b"].weight = model["a"].weight
    assert model_bytes(model) == 160


def test_convolutions_stay_dense_on_disk():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 2)).to("meta")
    scheme = QuantizationModifier(scheme="W8A16").schemes[0]
    assert list(dense_reasons(model, {"0": scheme, "2": scheme})) == ["0"]
