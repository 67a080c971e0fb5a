"""Words are those of compressed-tensors, and codes come back as they went in; every width, ragged rows."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

from lightning_compress.ops.pack import lanes, pack, reference, unpack

SHAPES = [(1, 1), (3, 31), (4, 32), (5, 70), (2, 129), (6, 256)]
BITS = range(1, 9)


def codes(shape, bits):
    """All codes of this width are in it, where there is room."""
    random = torch.Generator().manual_seed(bits)
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, generator=random, dtype=torch.int8)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_words_are_those_of_compressed_tensors(shape, bits):
    original = codes(shape, bits)
    for dim in (0, 1):
        words = pack(original, bits, dim)
        assert words.is_contiguous()
        assert torch.equal(words, pack_to_int32(original, bits, packed_dim=dim))
        result = unpack(words, bits, shape[dim], dim)
        assert result.is_contiguous()
        assert torch.equal(result, original)
        assert torch.equal(result, unpack_from_int32(words, bits, original.shape, packed_dim=dim))
    assert torch.equal(reference.pack(original, bits), pack(original, bits))
    assert torch.equal(reference.unpack(pack(original, bits), bits, shape[1]), original)


@pytest.mark.parametrize("bits", [3, 4, 7])
def test_any_words_survive_the_way_back(bits):
    words = torch.randint(-(2**31), 2**31, (3, 2 * bits), dtype=torch.int32)
    assert torch.equal(pack(unpack(words, bits, 64), bits), words)


@pytest.mark.parametrize("bits", [3, 4])
def test_experts_are_packed_one_by_one(bits):
    original = codes((2, 5, 40), bits)
    for dim in (1, 2):
        assert torch.equal(pack(original, bits, dim), pack_to_int32(original, bits, packed_dim=dim - 1))
        assert torch.equal(unpack(pack(original, bits, dim), bits, original.shape[dim], dim), original)


@pytest.mark.parametrize("bits", [2, 5])
def test_codes_may_lie_apart_and_rows_come_in_chunks(bits, monkeypatch):
    monkeypatch.setattr(lanes, "CHUNK", 150)
    original = codes((70, 9), bits).t()
    assert torch.equal(pack(original, bits), reference.pack(original, bits))
    words = pack(original, bits)
    assert torch.equal(unpack(words.t().contiguous().t(), bits, 70), original)


@pytest.mark.parametrize("bits", [3, 4])
def test_of_codes_out_of_range_the_low_bits_count(bits):
    original = torch.arange(-128, 128).to(torch.int8)
    inside = (original.int() + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)
    assert torch.equal(unpack(pack(original, bits), bits, 256).int(), inside)


def test_nothing_is_packed_to_nothing():
    assert pack(torch.zeros(0, 8).char(), 4).shape == (0, 1)
    assert pack(torch.zeros(3, 0).char(), 4).shape == (3, 0)
    assert unpack(torch.zeros(3, 0).int(), 4, 0).shape == (3, 0)


def test_ops_are_registered_soundly():
    torch.library.opcheck(torch.ops.lightning_compress.pack, (codes((3, 33), 5), 5))
    torch.library.opcheck(torch.ops.lightning_compress.unpack, (torch.zeros(3, 6).int(), 5, 33))


def test_compiles_and_exports_whole():
    class There(torch.nn.Module):
        def forward(self, original):
            return unpack(pack(original, 3, 0), 3, 40, 0)

    original = codes((40, 6), 3)
    assert torch.equal(torch.compile(There(), fullgraph=True, backend="aot_eager")(original), original)
    exported = torch.export.export(There(), (original,), dynamic_shapes=({1: torch.export.Dim("C")},))
    assert torch.equal(exported.module()(original.repeat(1, 2)), original.repeat(1, 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack(torch.zeros(2, 8), 4), "expected torch.int8, got torch.float32; codes are int8"),
        (lambda: unpack(torch.zeros(2, 8).long(), 4, 64), "expected torch.int32, got torch.int64"),
        (lambda: pack(torch.zeros(2, 8).char(), 9), "expected 1 to 8 bits, got 9"),
        (lambda: unpack(torch.zeros(2, 8).int(), 0, 64), "expected 1 to 8 bits, got 0"),
        (lambda: pack(torch.zeros(2, 8).char(), 4, 2), r"dimension 2 is out of range for a tensor of shape \(2, 8\)"),
        (lambda: pack(torch.zeros(()).char(), 4), "dimension -1 is out of range for a tensor"),
        (lambda: unpack(torch.zeros(2, 8).int(), 4, 65), r"65 codes of 4 bits need 9 words, got 8 along dimension -1"),
        (lambda: unpack(torch.zeros(2, 8).int(), 4, 56), "56 codes of 4 bits need 7 words, got 8"),
        (lambda: unpack(torch.zeros(2, 0).int(), 4, -1), "-1 codes of 4 bits"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
