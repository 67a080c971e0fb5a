"""Two processes on the CPU: rank 0 calibrates and writes, the others wait and receive."""

import time

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_compress import CompressionCallback, QuantizationModifier
from tests.support.training_runs import Regression, RoundingModifier, Sums, quiet

DDP = {"strategy": "ddp_fork", "devices": 2}


class Witness(Callback):
    """Each rank writes down what it has in the end."""

    def on_fit_end(self, trainer, pl_module):
        state = {n: t.clone() for n, t in pl_module.state_dict().items()}
        inputs = torch.linspace(-1, 1, 8)[None]
        mine = next(c for c in trainer.callbacks if isinstance(c, CompressionCallback))
        facts = {"done": mine.done, "seen": len(getattr(mine.lifecycle.modifiers[0], "_seen", []))}
        torch.save(
            {"state": state, "output": pl_module(inputs), "best": trainer.checkpoint_callback.best_model_path, **facts},
            f"{trainer.default_root_dir}/rank{trainer.global_rank}.pt",
        )


def ranks(folder):
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]


def test_two_ranks_end_with_one_compressed_model(tmp_path):
    class Slow(RoundingModifier):
        def on_calibration_end(self, state, event, **kwargs):
            super().on_calibration_end(state, event, **kwargs)
            time.sleep(0.5)

    best = ModelCheckpoint(tmp_path / "checkpoints", monitor="val/mse")
    module = Regression()
    trainer = quiet(tmp_path, CompressionCallback(Slow()), best, Witness(), max_epochs=2, **DDP)
    trainer.fit(module, Sums())
    zero, one = ranks(tmp_path)
    assert zero["done"]
    assert one["done"]
    assert (zero["seen"], one["seen"]) == (4, 0)  # rank 0 calibrates, on all samples
    assert all(torch.equal(zero["state"][n], one["state"][n]) for n in zero["state"])
    assert zero["best"] == one["best"] == str(tmp_path / "compressed.ckpt")
    assert module.is_rounded()  # in the parent process too
    trainer.test(module, Sums(), ckpt_path="best", verbose=False)
    assert (tmp_path / "report" / "summary.json").exists()


def test_quantized_activations_reach_every_rank(tmp_path):
    modifier = QuantizationModifier(scheme="W8A8", targets=["Linear"])
    quiet(tmp_path, CompressionCallback(modifier), Witness(), **DDP).fit(Regression(), Sums())
    zero, one = ranks(tmp_path)
    assert torch.equal(zero["output"], one["output"])
    plain = Regression()
    plain.load_state_dict(one["state"])
    assert not torch.equal(plain(torch.linspace(-1, 1, 8)[None]), one["output"])
    assert (tmp_path / "compressed" / "model.safetensors").exists()


def test_a_failure_on_rank_0_ends_the_others(tmp_path):
    class Fails(RoundingModifier):
        def on_calibration_end(self, state, event, **kwargs):
            raise ArithmeticError("not positive definite")

    with pytest.raises(Exception, match="not positive definite"):
        quiet(tmp_path, CompressionCallback(Fails()), **DDP).fit(Regression(), Sums())
    assert not (tmp_path / "compressed.ckpt").exists()
