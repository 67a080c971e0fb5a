"""FoldBatchNormModifier before the quantizers, QAT with folding, and the export of both."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lightning_compress import (
    FoldBatchNormModifier,
    GPTQModifier,
    QATModifier,
    QuantizationModifier,
    compress,
    load,
    save,
)
from lightning_compress.core import Lifecycle, State
from lightning_compress.quant.batch_norm import fold_all
from tests.quant.test_batch_norm import lived
from tests.support.training_loop import train

GROUPS = {
    "g": {
        "targets": ["Conv1d", "Linear"],
        "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor"},
    }
}
X = torch.randn(6, 16, generator=torch.Generator().manual_seed(3))


def convolutional() -> nn.Sequential:
    torch.manual_seed(0)
    convolution = nn.Sequential(nn.Conv1d(1, 4, 3, bias=False), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 6, 3, 2))
    return nn.Sequential(
        nn.Unflatten(1, (1, 16)), *convolution, nn.BatchNorm1d(6), nn.ReLU(), nn.Flatten(), nn.Linear(36, 8)
    )


@pytest.mark.parametrize("quantizer", [QuantizationModifier, GPTQModifier])
def test_folded_then_quantized_then_loaded(tmp_path, quantizer):
    """The folded weight is what lies on the grid; a model of the same architecture takes the export."""
    model = lived(convolutional(), 32, 16)
    expected = copy.deepcopy(model)
    fold_all(expected)
    data = [torch.randn(64, 16, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    ledger = compress(model, [FoldBatchNormModifier(), quantizer(config_groups=GROUPS)], data)
    compress(expected, quantizer(config_groups=GROUPS), data)
    assert torch.equal(model(X), expected(X))
    assert [row.technique for row in ledger][:2] == ["fold_batchnorm", "fold_batchnorm"]
    save(model, tmp_path / "out")
    assert torch.equal(load(tmp_path / "out", convolutional()).eval()(X), model(X))


def test_removed_norms_are_loaded_into_a_model_folded_alike(tmp_path):
    model = lived(convolutional(), 32, 16)
    before = model(X)
    compress(model, [FoldBatchNormModifier(remove=True), QuantizationModifier(config_groups=GROUPS)])
    assert_close(model(X), before, rtol=0, atol=0.1)
    save(model, tmp_path / "out")
    fresh = convolutional()
    fold_all(fresh, remove=True)
    assert torch.equal(load(tmp_path / "out", fresh)(X), model(X))


def test_training_goes_on_with_folded_norms(tmp_path):
    model = lived(convolutional(), 32, 16)
    dense = copy.deepcopy(model)
    lifecycle = Lifecycle([QATModifier(config_groups=GROUPS, fold_batchnorm=True)])
    lifecycle.initialize(State(model=model))
    assert list(model.state_dict()) == list(dense.state_dict())
    assert_close(model(X), dense(X), rtol=0, atol=0.1)  # but for 8 bits
    train(model, [], 4, lifecycle=lifecycle)
    for norm in (model[2], model[5]):
        assert (norm.weight == 1).all()
        assert (norm.running_mean == 0).all()
        assert norm.bias.grad.abs().max() > 0  # the shift trains
    model.eval()
    before = model(X)
    lifecycle.finalize(State(model=model))
    assert torch.equal(model(X), before)
    save(model, tmp_path / "out")
    assert torch.equal(load(tmp_path / "out", convolutional()).eval()(X), before)


def test_the_modifier_keeps_norms_in_evaluation_mode():
    model = lived(convolutional(), 32, 16)
    train(model, [FoldBatchNormModifier()], 3)
    assert (model[2].running_mean == 0).all()


@pytest.mark.parametrize("modifier", [FoldBatchNormModifier(), QATModifier(config_groups=GROUPS, fold_batchnorm=True)])
def test_a_model_without_batch_norm(modifier):
    with pytest.raises(ValueError, match="no BatchNorm to fold: Sequential has none"):
        Lifecycle([modifier]).initialize(State(model=nn.Sequential(nn.Linear(16, 8))))


def test_norms_that_have_seen_no_batch_are_named():
    with pytest.warns(UserWarning, match="that have seen no batch .*: '2', '5'; fold a model that is trained already"):
        fold_all(convolutional())


STATIC: dict[str, object] = {"targets": ["Linear", "Conv1d"], "scheme": "INT8_STATIC"}


@pytest.mark.parametrize("quantizer", [QuantizationModifier, GPTQModifier])
def test_folding_when_training_has_ended_is_folding_a_trained_model(quantizer):
    model = lived(convolutional(), 32, 16)
    expected, data = copy.deepcopy(model), [torch.randn(64, 16, generator=torch.Generator().manual_seed(1))]
    compress(model, [FoldBatchNormModifier(when="training_end"), quantizer(**STATIC)], data)
    compress(expected, [FoldBatchNormModifier(), quantizer(**STATIC)], data)
    assert torch.equal(model(X), expected(X))


def test_norms_train_until_the_end_and_are_folded_into_the_grids_then(tmp_path):
    model = lived(convolutional(), 32, 16)
    lifecycle = Lifecycle([QATModifier(**STATIC), FoldBatchNormModifier(when="end")])
    lifecycle.initialize(State(model=model))
    statistics = model[2].running_mean.clone()
    train(model, [], 4, lifecycle=lifecycle)
    assert not torch.equal(model[2].running_mean, statistics)
    model.eval()
    before = model(X)
    lifecycle.finalize(State(model=model))
    assert (model[2].running_mean == 0).all()
    assert_close(model(X), before, rtol=0, atol=1e-5)  # codes and input grids are those that it was trained with
    save(model, tmp_path / "out")
    assert torch.equal(load(tmp_path / "out", convolutional()).eval()(X), model(X))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (lambda: [QATModifier(**STATIC), FoldBatchNormModifier(when="training_end")], "QATModifier still computes the"),
        (lambda: [FoldBatchNormModifier(when="end"), QATModifier(**STATIC)], "place it after that in the recipe"),
        (lambda: [FoldBatchNormModifier(when="end", remove=True)], "leave remove out, or give when='set_up'"),
    ],
)
def test_moments_that_do_not_fit_are_refused_at_set_up(recipe, message):
    with pytest.raises(ValueError, match=message):
        Lifecycle(recipe()).initialize(State(model=convolutional()))


@pytest.mark.parametrize("when", ["set_up", "training_end", "end"])
def test_norms_are_required_unless_the_recipe_says_otherwise(when):
    model = nn.Sequential(nn.Linear(16, 8))
    with pytest.raises(ValueError, match="no BatchNorm to fold: Sequential has none"):
        Lifecycle([FoldBatchNormModifier(when=when)]).initialize(State(model=model))
    lifecycle = Lifecycle([FoldBatchNormModifier(when=when, required=False)])
    lifecycle.initialize(State(model=model))
    lifecycle.finalize(State(model=model))
