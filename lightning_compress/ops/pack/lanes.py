"""Packing in plain torch: neighbours are merged in ever wider lanes of one integer, in a few passes over the codes.

    8 codes of b bits, a byte each      | b | b | b | b | b | b | b | b |     one int64
    pairs, in 16 bits each              |  2b   |  2b   |  2b   |  2b   |     the odd byte shifts down by 8 - b
    fours, in 32 bits each              |      4b       |      4b       |     16 - 2b
    all                                 |              8b               |     32 - 4b: its first b bytes are the result

Where 2 or 4 codes fill a byte (4 and 2 bits), an int16 or int32 is enough. A few rows are packed at a time, so that
intermediate values stay in the cache. Bytes of a word are in little-endian order.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["pack_rows", "unpack_rows"]

CHUNK = 1 << 18  # codes at a time: 2^18 and 2^20 ran equally, 2^16 took twice as long (AMD EPYC, one thread)
LANES = {8: (torch.uint8, 1), 4: (torch.int16, 2), 2: (torch.int32, 4)}  # other widths: (torch.int64, 8)


def pack_rows(codes_RC: Tensor, bits: int) -> Tensor:
    """Words int32 [R, P] of codes int8 [R, C]."""
    R, C = codes_RC.shape
    words_RP = codes_RC.new_empty((R, -(-C * bits // 32)), dtype=torch.int32)
    rows = max(1, CHUNK // max(1, C))
    for codes, words in zip(codes_RC.split(rows), words_RP.split(rows), strict=True):
        _pack(codes, bits, words)
    return words_RP


def unpack_rows(words_RP: Tensor, bits: int, C: int) -> Tensor:
    """Codes int8 [R, C] of words int32 [R, P]."""
    codes_RC = words_RP.new_empty((len(words_RP), C), dtype=torch.int8)
    rows = max(1, CHUNK // max(1, C))
    for words, codes in zip(words_RP.split(rows), codes_RC.split(rows), strict=True):
        _unpack(words, bits, codes)
    return codes_RC


def _pack(codes_RC: Tensor, bits: int, words_RP: Tensor) -> None:
    lane, n = LANES.get(bits, (torch.int64, 8))
    offset, C = 1 << bits - 1, codes_RC.shape[1]
    padded_RC = F.pad(codes_RC, (0, -C % 32), value=-offset) if C % 32 else codes_RC.contiguous()
    v = padded_RC.view(lane).bitwise_xor(_every(8, offset, n)).bitwise_and_(_every(8, (1 << bits) - 1, n))
    size = 1  # codes in a lane
    while size < n:
        low = _every(16 * size, (1 << size * bits) - 1, n // (2 * size))
        v = _merged(v, v >> size * (8 - bits), low, low << size * bits, bits)
        size *= 2
    bytes_RB = v.to(torch.uint8) if 8 % bits == 0 else v.view(torch.uint8).unflatten(1, (-1, 8))[..., :bits].flatten(1)
    words_RP.copy_(bytes_RB.view(torch.int32)[:, : words_RP.shape[1]])


def _unpack(words_RP: Tensor, bits: int, codes_RC: Tensor) -> None:
    lane, n = LANES.get(bits, (torch.int64, 8))
    padded_RP = F.pad(words_RP, (0, -words_RP.shape[1] % bits)) if words_RP.shape[1] % bits else words_RP.contiguous()
    bytes_RB = padded_RP.view(torch.uint8)
    if 8 % bits == 0:
        v = bytes_RB.to(lane)
    else:
        v = F.pad(bytes_RB.unflatten(1, (-1, bits)), (0, 8 - bits)).flatten(1).view(lane)
    size = n // 2
    while size:
        low = _every(16 * size, (1 << size * bits) - 1, n // (2 * size))
        v = _merged(v, v << size * (8 - bits), low, low << 8 * size, bits)
        size //= 2
    torch.sub(v.view(torch.int8)[:, : codes_RC.shape[1]], 1 << bits - 1, out=codes_RC)


def _merged(v: Tensor, shifted: Tensor, low: int, high: int, bits: int) -> Tensor:
    """The bits ``low`` of v and ``high`` of ``shifted``; with up to 4 bits the two do not overlap."""
    if bits <= 4:
        return shifted.bitwise_or_(v).bitwise_and_(low | high)
    return shifted.bitwise_and_(high).bitwise_or_(v & low)


def _every(step: int, mask: int, times: int) -> int:
    """The bits of ``mask`` at 0, ``step``, 2 ``step`` ..."""
    return sum(mask << step * i for i in range(times))
