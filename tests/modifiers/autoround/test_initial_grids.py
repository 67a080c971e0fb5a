"""Where the descent begins."""

import copy

import torch
from torch import nn

from lightning_compress import AutoRoundModifier, GPTQModifier, compress
from lightning_compress.quant.record import Quantized
from tests.support.quantization_runs import correlated


def test_without_steps_it_is_gptq():
    data = [correlated(40, 64, i) for i in range(4)]
    dense = nn.Sequential(nn.Linear(64, 24))
    scheme = {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 3, "group_size": 16}}}}
    ours, theirs = copy.deepcopy(dense), copy.deepcopy(dense)
    compress(ours, AutoRoundModifier(**scheme, iters=0), data)
    compress(theirs, GPTQModifier(**scheme), data)
    assert torch.equal(ours[0].weight, theirs[0].weight)
    assert torch.equal(Quantized.of(ours[0]).scale, Quantized.of(theirs[0]).scale)
