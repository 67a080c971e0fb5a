"""The metric that a Trainer's model is measured by is that of its validation set."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_compress.core import Event, Lifecycle, State
from lightning_compress.training.measurement import summing_device
from lightning_compress.training.options import CallbackOptions
from lightning_compress.training.post_training import PostTraining
from lightning_compress.training.run import Run
from tests.support.training_runs import Regression, RoundingModifier, Sums, best, quiet


@pytest.mark.parametrize(("eval_batches", "rows"), [(None, 16), (2, 8)])
def test_it_is_the_mean_over_the_batches_that_are_measured(tmp_path, eval_batches, rows):
    module, data, steps = Regression(), Sums(), []
    trainer = quiet(tmp_path, best(tmp_path))
    trainer.fit(module, data)
    run, lifecycle = Run(CallbackOptions(eval_batches=eval_batches), {}), Lifecycle([RoundingModifier()])
    post_training = PostTraining(trainer, module, lifecycle, State(model=module.model), run, Event(), {})
    measurement = post_training.measure("metric", lambda *step: steps.append(step))
    x, y = data.rows[:rows]
    with torch.no_grad():
        expected = nn.functional.mse_loss(module(x), y)
    assert measurement.values == {"val/mse": pytest.approx(expected.item())}
    assert measurement.batches == rows // 4 == len(steps)
    assert steps[-1] == ("metric", rows // 4, rows // 4)


def test_a_single_process_adds_up_on_the_cpu():
    for size, device in ((1, "cpu"), (2, "mps")):
        trainer = SimpleNamespace(world_size=size, strategy=SimpleNamespace(root_device=torch.device("mps")))
        assert summing_device(trainer) == torch.device(device)
