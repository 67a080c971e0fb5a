"""A survey where blocks come for their calls only: they come again when the backward pass computes them anew."""

from contextlib import ExitStack, contextmanager

import pytest
import torch

from lightning_compress import GPTQModifier
from lightning_compress.calibration import calibrate
from lightning_compress.calibration.residence import InMemory
from tests.modifiers.tune.test_modifier import W2, ids, llama
from tests.support.calibration_models import started


class Streamed(InMemory):
    """While the model runs through blocks, the weights of each are NaN but in its calls and visits."""

    away: dict = {}

    @contextmanager
    def visit(self, name, block):
        weights = [p for p in block.parameters() if p in self.away]
        for p in weights:
            p.data = self.away.pop(p)
        try:
            yield
        finally:
            for p in weights:
                self.leave(p)

    def leave(self, p):
        self.away[p], p.data = p.data, torch.full_like(p, torch.nan)

    @contextmanager
    def passing(self, blocks):
        visits = {}

        def come(block, args):
            visits[block] = stack = visits.get(block, ExitStack())
            stack.enter_context(self.visit("", block))

        handles = [block.register_forward_pre_hook(come) for block in blocks.values()]
        handles += [block.register_forward_hook(lambda b, *_: visits.pop(b).close()) for block in blocks.values()]
        for block in blocks.values():
            for p in block.parameters():
                self.leave(p)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for visit in visits.values():  # of runs that were stopped inside a block
                visit.close()
            for p in list(self.away):
                p.data = self.away.pop(p)


@pytest.mark.filterwarnings("ignore")
def test_blocks_come_again_in_the_backward_pass():
    ends = []
    for residence in (InMemory(), Streamed()):
        model = llama()
        calibrate(*started(GPTQModifier(**W2, objective="loss"), model=model), ids(), residence=residence)
        ends.append(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*[end.values() for end in ends], strict=True))
