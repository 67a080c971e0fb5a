"""Targets of a calibration and the moments of their inputs."""

import torch
from torch import nn
from torch.testing import assert_close

from lightning_compress.layerwise.hessian_collector import Gathering


def test_modules_with_one_input_share_a_moment_and_are_done_once():
    modules, x, y = {n: nn.Linear(4, 3) for n in ("q", "k", "o", "spare")}, torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    gathering = Gathering(modules)
    for name, tensor in (("q", x), ("k", x), ("o", y)):
        gathering.observe(name, (tensor,), None)
    (q, module, first), (k, _, second) = gathering.complete(["q", "k", "spare"])
    assert (q, k, module) == ("q", "k", modules["q"])
    assert first is second
    assert list(gathering.left) == ["o", "spare"]
    assert gathering.complete(["q", "k"]) == []


def test_tokens_that_do_not_count_are_left_out():
    gathering, x = Gathering({"a": nn.Linear(4, 3)}), torch.randn(2, 5, 4)
    mask = torch.rand(2, 5) > 0.5
    gathering.observe("a", (x,), mask)
    [(_, _, shared)] = gathering.complete(["a"])
    assert shared.moment.tokens == int(mask.sum())
    assert_close(shared.moment.value()[0], x[mask].t() @ x[mask] / int(mask.sum()))
