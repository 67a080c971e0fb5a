"""What a Trainer and a recipe cannot do together is an error before training."""

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging

from lightning_compress import CompressionCallback
from tests.support.training_runs import RecordingModifier, Regression, Sums, best, quiet, rounding


@pytest.mark.parametrize("averaging", [EMAWeightAveraging, lambda: StochasticWeightAveraging(0.1)], ids=["EMA", "SWA"])
def test_averaging_after_us_is_refused(tmp_path, averaging):
    with pytest.raises(ValueError, match="WeightAveraging is listed after CompressionCallback"):
        quiet(tmp_path, rounding(), averaging()).fit(Regression(), Sums())


def test_averaging_before_us_is_compressed(tmp_path):
    trainer, module = quiet(tmp_path, EMAWeightAveraging(), rounding(), best(tmp_path)), Regression()
    trainer.fit(module, Sums())
    assert module.is_rounded()
    saved = torch.load(tmp_path / "compressed.ckpt", weights_only=True)
    assert all(torch.equal(saved["state_dict"][n], t) for n, t in module.state_dict().items())


def test_averaging_and_added_tensors_do_not_go_together(tmp_path):
    class Masks(RecordingModifier):
        def on_initialize(self, state, **kwargs):
            state.model[0].register_buffer("mask", torch.ones(8, 8))
            return True

    with pytest.raises(ValueError, match="pairs tensors by position"):
        quiet(tmp_path, EMAWeightAveraging(), CompressionCallback(Masks())).fit(Regression(), Sums())


def test_sharded_strategies_are_refused(tmp_path):
    from lightning.pytorch.strategies import FSDPStrategy

    trainer = quiet(tmp_path, rounding())
    trainer.strategy.__class__ = type("Sharded", (FSDPStrategy,), {})
    with pytest.raises(ValueError, match="shards the weights"):
        trainer.callbacks[0].setup(trainer, Regression(), "fit")
