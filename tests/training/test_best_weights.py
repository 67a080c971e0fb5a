"""The best weights by a metric are compressed, and what ``best`` means afterwards."""

import torch
from torch import nn

from lightning_compress import CompressionCallback
from tests.support.training_runs import Regression, RoundingModifier, Sums, best, quiet, rounding


def test_best_means_the_compressed_model(tmp_path):
    trainer, module, data = quiet(tmp_path, rounding(), best(tmp_path)), Regression(), Sums()
    trainer.fit(module, data)
    assert trainer.checkpoint_callback.best_model_path == str(tmp_path / "compressed.ckpt")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(7)
    trainer.test(module, data, ckpt_path="best", verbose=False)
    assert module.is_rounded()


def test_the_best_weights_are_compressed_not_the_last(tmp_path):
    class Worsens(Regression):
        def validation_step(self, batch, batch_idx):
            self.log("val/mse", float(self.current_epoch))

    module = Worsens()
    checkpoints = best(tmp_path)
    seen = {}

    class Looks(RoundingModifier):
        def on_calibration_start(self, state, event, **kwargs):
            seen.update({n: t.clone() for n, t in state.model.state_dict().items()})
            super().on_calibration_start(state, event, **kwargs)

    trainer = quiet(tmp_path, CompressionCallback(Looks()), checkpoints, max_epochs=3)
    trainer.fit(module, Sums())
    kept = torch.load(next(tmp_path.glob("checkpoints/epoch=0*")), weights_only=True)["state_dict"]
    assert all(torch.equal(seen[n], kept[f"model.{n}"]) for n in seen)


def test_load_best_can_be_left_out(tmp_path):
    trainer, module = quiet(tmp_path, rounding(load_best=False), best(tmp_path)), Regression()
    trainer.fit(module, Sums())
    assert trainer.callbacks[0].done
    assert module.is_rounded()


def test_a_checkpoint_of_this_run_may_hold_objects(tmp_path):
    class Hyper(Regression):
        def __init__(self, net):
            super().__init__()
            self.save_hyperparameters(logger=False)

    module = Hyper(nn.Linear(1, 1))
    quiet(tmp_path, rounding(), best(tmp_path)).fit(module, Sums())
    assert module.is_rounded()
