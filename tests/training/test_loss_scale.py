"""The loss that modifiers see in fp16 is unscaled, and what they add is scaled."""

from types import SimpleNamespace

import pytest
import torch

from lightning_compress.training.loss_scale import unscaled


@pytest.mark.parametrize("scale", [None, 1.0, 1024.0])
def test_what_is_added_inside_is_scaled_afterwards(scale):
    scaler = None if scale is None else SimpleNamespace(get_scale=lambda: scale)
    trainer = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=scaler))
    factor = scale or 1.0
    loss = torch.tensor(3.0 * factor)
    with unscaled(trainer, loss):
        assert loss.item() == 3.0
        loss.add_(2.0)
    assert loss.item() == 5.0 * factor
