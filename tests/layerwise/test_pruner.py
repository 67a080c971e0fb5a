"""What pruners on calibration data share: walks, batches, padding, layers that cannot be pruned."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from lightning_compress import GPTQModifier, compress
from lightning_compress.layers.matrix import as_matrix
from lightning_compress.modifiers.sparsegpt import SparseGPTModifier
from tests.support.pruning_runs import kept_per_group
from tests.support.quantization_runs import attention, batches, calibrate, correlated


def test_splitting_the_batches_changes_nothing():
    data, modifier = batches(), {"targets": ["q", "k"], "mask_structure": "2:4"}
    whole, parts = attention(), attention()
    calibrate(whole, SparseGPTModifier(**modifier), [torch.cat(data)])
    calibrate(parts, SparseGPTModifier(**modifier), [piece for batch in data for piece in batch.split(1)])
    for name in ("q", "k"):
        one, other = getattr(whole, name).weight, getattr(parts, name).weight
        assert torch.equal(one == 0, other == 0)
        assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_padding_does_not_count():
    data = batches(2)
    masks = [torch.arange(48).expand(2, 48) < 30 for _ in data]
    padded = [torch.where(mask[..., None], x, 1e3) for x, mask in zip(data, masks, strict=True)]
    clean, dirty = attention(), attention()
    calibrate(clean, SparseGPTModifier(targets=["q"]), [x[:, :30] for x in data])
    calibrate(dirty, SparseGPTModifier(targets=["q"]), padded, masks)
    assert_close(dirty.q.weight, clean.q.weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(4, 8, 3, padding=1), (6, 4, 10, 10)),
        (nn.Conv2d(8, 8, 3, groups=2, stride=2), (6, 8, 21, 21)),
        (nn.Conv1d(4, 8, 3, padding="same"), (8, 4, 20)),
        (Conv1D(8, 12), (5, 20, 12)),
    ],
    ids=["conv2d", "grouped", "conv1d", "gpt2"],
)
def test_convolutions_and_transposed_layers(layer, shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    model = nn.Sequential(layer)
    dense, W = layer(x).detach(), as_matrix(layer).clone()
    [row] = calibrate(model, SparseGPTModifier(targets=[type(layer).__name__], mask_structure="2:4"), [x])
    Q = as_matrix(layer)
    assert (kept_per_group(Q, 4) == 2).all()
    bias = layer.bias.view(-1, *[1] * (x.ndim - 2)) if x.ndim > 3 or isinstance(layer, nn.Conv1d) else layer.bias
    error = ((layer(x) - dense).square().sum() / (dense - bias).square().sum()).item()
    assert row.error == pytest.approx(error, rel=1e-2)
    assert not torch.equal(Q, W)


@pytest.mark.parametrize("walk", ["one_pass", "two_pass", "whole"])
def test_in_every_walk(walk):
    model = nn.Sequential(*[nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)) for _ in range(2)])
    ledger = compress(model, SparseGPTModifier(), [correlated(64, 16, i) for i in range(3)], walk=walk)
    assert [(row.sparsity, row.tokens) for row in ledger] == [(0.5, 192)] * 4


def test_what_is_quantized_already_is_refused():
    model = nn.Sequential(nn.Linear(32, 32))
    with pytest.raises(ValueError, match="'0' is quantized already: put SparseGPTModifier before what quantizes it"):
        compress(model, [GPTQModifier(scheme="W4A16", group_size=32), SparseGPTModifier()], [correlated(256, 32)])


def test_nan_is_named():
    with pytest.raises(ValueError, match=r"nan|NaN"):
        compress(nn.Sequential(nn.Linear(8, 8)), SparseGPTModifier(), [torch.full((4, 8), float("nan"))])
