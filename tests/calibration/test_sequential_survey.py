"""The survey: the dense model as a whole, before anything in it changes."""

import torch
from torch import nn
from torch.testing import assert_close

from lightning_compress import compress
from lightning_compress.core import Modifier, Needs


class Halver(Modifier):
    """Halves every Linear of a block at its end; with ``looks`` it surveys the model first."""

    looks: bool = True

    _seen: dict = {}
    _order: list = []

    @property
    def needs(self):
        return Needs(data=True, survey=self.looks)

    def on_initialize(self, state, **kwargs):
        return True

    def on_calibration_start(self, state, event, **kwargs):
        for name, module in state.model.named_modules():
            if isinstance(module, nn.Linear):
                self.hook(module, lambda _, x, name=name: self._seen.setdefault(name, []).append(x[0].clone()))

    def on_block_surveyed(self, state, event, **kwargs):
        self._order.append(("surveyed", state.block_name))

    def on_block_end(self, state, event, **kwargs):
        self._order.append(("end", state.block_name))
        for module in state.modules.values():
            if isinstance(module, nn.Linear):
                module.weight.data /= 2


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2)], nn.Linear(8, 4))


def test_every_block_sees_dense_inputs_before_the_first_block_ends():
    model, data = network(), [torch.randn(5, 8) for _ in range(3)]
    with torch.no_grad():
        dense = [model[0](x) for x in data]
    modifier = Halver()
    compress(model, modifier, data)
    assert modifier._order == [("surveyed", n) for n in ("0", "1", "")] + [("end", n) for n in ("0", "1", "")]
    assert_close(modifier._seen["1.0"][:3], dense)
    assert len(modifier._seen["1.0"]) == 6  # and the walk's, halved
    assert_close(modifier._seen["1.0"][3:], [model[0](x).detach() for x in data])


def test_others_do_not_take_part():
    silent, model = Halver(looks=False), network()
    compress(model, [Halver(), silent], [torch.randn(5, 8) for _ in range(3)])
    assert len(silent._seen["1.0"]) == 3
    assert [what for what, _ in silent._order] == ["end"] * 3
