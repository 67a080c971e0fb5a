"""Work between training steps leaves no trace in training."""

import torch
from lightning.pytorch.trainer.states import RunningStage

from tests.support.training_runs import Regression, Sums, quiet, rounding


def test_modes_and_random_state_are_given_back(tmp_path):
    stages, states = [], []

    class Looks(Regression):
        def on_train_end(self):
            stages.append(self.trainer.state.stage)
            states.append((self.training, self.model[1].training, torch.get_rng_state()))

    def run(folder, *callbacks):
        torch.manual_seed(1)
        module = Looks()
        module.model[1].eval()
        quiet(folder, *callbacks).fit(module, Sums())
        return module

    run(tmp_path / "without")
    module = run(tmp_path / "with", rounding())
    assert stages == [RunningStage.TRAINING] * 2
    assert states[0][:2] == states[1][:2]
    assert torch.equal(states[0][2], states[1][2])
    assert not any(t.is_inference() for t in (*module.parameters(), *module.buffers()))
