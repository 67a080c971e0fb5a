"""Comparisons and models for tests of exports."""

import re

import torch
from torch import nn

from lightning_compress.quant.record import Quantized


def conv_net():
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.BatchNorm2d(8)]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(128, 16)).eval()


def assert_same_records(model, other):
    assert Quantized.find(model).keys() == Quantized.find(other).keys() != set()
    for name, (_, record) in Quantized.find(model).items():
        again = Quantized.of(other.get_submodule(name))
        for key in ("weights", "input_activations", "output_activations"):
            assert getattr(record.scheme, key) == getattr(again.scheme, key)
        for key in ("scale", "zero_point", "input_scale"):
            mine, its = getattr(record, key), getattr(again, key)
            assert (mine is None) == (its is None)
            assert mine is None or (torch.equal(mine, its) and mine.dtype == its.dtype)


def all_files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def without_errors(card: bytes) -> bytes:
    """A model card without the standard errors of metrics: ranks that measure the same batches count each as new."""
    return re.sub(rb" \xc2\xb1 [^)]*|checksum of the text above, \w+", b"", card)
