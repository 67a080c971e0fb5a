"""Masks to begin with: from magnitude, or from a sparse model on disk."""

import pytest
import torch
from safetensors.torch import save_file

from lightning_compress.pruning.masks import keep_mask
from tests.support.learned_mask_runs import logits_of, started
from tests.support.training_loop import network


def test_it_begins_with_the_mask_of_magnitude():
    model = network()
    expected = keep_mask(model[0].weight.detach().abs(), 0.5, "2:4")
    started(model)
    assert (logits_of(model[0]).hard() == expected).float().mean() > 0.95


def test_it_begins_with_the_mask_of_a_sparse_model(tmp_path):
    model, sparse = network(), network()
    mask = keep_mask(torch.rand(32, 16), 0.5, "2:4")
    with torch.no_grad():
        sparse[0].weight.mul_(mask)
    save_file(dict(sparse.state_dict()), tmp_path / "model.safetensors")
    started(model, prior=str(tmp_path), prior_strength=30.0)
    assert torch.equal(logits_of(model[0]).hard(), mask)


def test_priors_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="expected 'magnitude', a .safetensors file, or a folder"):
        started(network(), prior=tmp_path)
    save_file({"0.weight": torch.ones(32, 16)}, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match="has no 2.weight; it holds 1 tensors, such as 0.weight"):
        started(network(), prior=tmp_path / "part.safetensors")
    save_file({"0.weight": torch.ones(4, 16), "2.weight": torch.ones(8, 32)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"0.weight is \(4, 16\) as a matrix, and in this model \(32, 16\)"):
        started(network(), prior=tmp_path / "other.safetensors")
    (tmp_path / "half.safetensors").write_bytes((tmp_path / "other.safetensors").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"half.safetensors is not a complete safetensors file"):
        started(network(), prior=tmp_path / "half.safetensors")
