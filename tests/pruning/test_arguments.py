"""What pruners on calibration data are asked: sparsity of layers, targets, patterns, by messages."""

import pytest
import torch
from torch import nn

from lightning_compress import compress
from lightning_compress.modifiers.sparsegpt import SparseGPTModifier
from tests.support.pruning_runs import REFUSED
from tests.support.quantization_runs import attention, batches, calibrate


def test_layers_may_have_their_own_sparsity():
    model = attention()
    calibrate(model, SparseGPTModifier(sparsity={"re:[qo]": 0.75, "q": 0.25}), batches())
    zeros = [(getattr(model, n).weight == 0).float().mean().item() for n in "qkvo"]
    assert zeros == [0.25, 0.0, 0.0, 0.75]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *REFUSED,
        ({"mask_structure": "3:6"}, "block_size=128 is not a multiple of 6"),
        ({"scope": "layer"}, "scope='layer'"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SparseGPTModifier(**arguments)


def test_targets_that_cannot_be_pruned_are_named_before_any_work():
    model = nn.Sequential(nn.Linear(10, 4), nn.Embedding(4, 4))
    with pytest.raises(ValueError, match=r"mask_structure='2:4' does not divide the columns of 0 \(10\)"):
        compress(model, SparseGPTModifier(mask_structure="2:4"), [torch.randn(2, 10)])
    with pytest.raises(ValueError, match=r"cannot prune 1 \(Embedding\)"):
        compress(model, SparseGPTModifier(targets=["Embedding"]), [torch.randn(2, 10)])
    with pytest.raises(ValueError, match="needs calibration data"):
        compress(model, SparseGPTModifier(), None)
