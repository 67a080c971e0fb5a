"""Compiled modules: hooks that come later are seen."""

import torch

from tests.support.training_runs import Regression, Sums, quiet, rounding


def test_a_compiled_module_is_seen_through(tmp_path):
    class Compiled(Regression):
        def setup(self, stage):
            if stage == "fit":
                self.model = torch.compile(self.model, backend="eager")

    module = Compiled()
    callback = rounding()
    quiet(tmp_path, callback, limit_train_batches=2).fit(module, Sums())
    assert callback._state.model is module.model._orig_mod
    assert len(callback.lifecycle.modifiers[0]._seen) > 0  # hooks that were added after compilation fire
    assert module.is_rounded()
