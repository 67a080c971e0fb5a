"""A run on token ids: the same ids each time, in eval mode; other models are refused."""

import pytest
import torch
from torch import nn

from lightning_compress import RotationModifier, compress
from lightning_compress.modifiers.rotation.token_run import token_run


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.drop, self.calls = nn.Embedding(50, 4), nn.Dropout(0.5), []

    def forward(self, ids):
        self.calls.append((ids, self.training, torch.is_grad_enabled()))
        return self.drop(self.table(ids))


def test_a_run_repeats_its_tokens_in_eval_mode_and_restores_the_modes():
    model = Net().train()
    model.drop.eval()
    run = token_run(model, rows=3)
    assert torch.equal(run(), run())
    (ids, *first), (again, *second) = model.calls
    assert torch.equal(ids, again)
    assert (ids.shape, int(ids.max()) < 50) == ((3, 16), True)
    assert first == second == [False, False]
    assert (model.training, model.drop.training) == (True, False)
    token_run(model, rows=3, seed=1)()
    assert not torch.equal(model.calls[-1][0], ids)


@pytest.mark.parametrize(("model", "message"), [
    (nn.Sequential(nn.Linear(4, 4)), "Sequential has no nn.Embedding"),
    (nn.ModuleDict({"table": nn.Embedding(4, 4)}), "ModuleDict does not run on .2, 16. of them"),
])  # fmt: skip
def test_models_of_other_inputs_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        compress(model, RotationModifier())
