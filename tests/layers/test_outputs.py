"""Logits are read from whatever models give."""

from types import SimpleNamespace

import pytest
import torch

from lightning_compress.layers.outputs import logits_of

LOGITS = torch.randn(2, 3, 5)


OUTPUTS = [LOGITS, SimpleNamespace(logits=LOGITS), {"logits": LOGITS}, (LOGITS, 1), [LOGITS]]


@pytest.mark.parametrize("output", OUTPUTS, ids=lambda output: type(output).__name__)
def test_logits_of_any_output(output):
    assert logits_of(output) is LOGITS or torch.equal(logits_of(output), LOGITS)
    assert torch.equal(logits_of(output, 1), LOGITS.movedim(1, -1))


NO_LOGITS = [None, {"features": LOGITS}, (), SimpleNamespace(logits=None), "text"]


@pytest.mark.parametrize("output", NO_LOGITS, ids=lambda output: type(output).__name__)
def test_outputs_without_logits_are_refused(output):
    with pytest.raises(ValueError, match="found no logits in an output of type"):
        logits_of(output)
