"""F against gradients of single tokens; what rounding costs against the divergence that it leads to."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from pydantic import PrivateAttr
from torch import nn
from torch.testing import assert_close

from lightning_compress import compress
from lightning_compress.core import Modifier, Needs
from lightning_compress.modifiers.allocate.sensitivity import PIECE, Fisher, Sensitivities, predicted_loss
from lightning_compress.quant.fake_quant import round_weight
from lightning_compress.quant.rounding import find_scales


class Surveying(Modifier):
    """Surveys all layers, and leaves them as they are."""

    kind: str = "values"
    _sensitivities: Sensitivities | None = PrivateAttr(default=None)

    @property
    def needs(self):
        return Needs(data=True, survey=True, gradients=self.kind)

    def on_initialize(self, state, **kwargs):
        return True

    def on_calibration_start(self, state, event, **kwargs):
        modules = state.model.named_modules()
        layers = {name: module for name, module in modules if isinstance(module, nn.Linear | nn.Conv2d)}
        self._sensitivities = Sensitivities(layers)
        self._sensitivities.watch(self)

    def on_block_surveyed(self, state, event, **kwargs):
        self.remove_hooks()


def surveyed(model, batches, kind="values", **arguments):
    modifier = Surveying(kind=kind)
    compress(model, modifier, batches, **arguments)
    return modifier._sensitivities


def by_token(model, name, batches):
    """Sums of squared gradients of a weight, one sample at a time, from the same labels: float64."""
    total = 0
    for number, batch in enumerate(batches):
        output = model(batch)
        noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(number))
        for sample, label in zip(output, noise, strict=True):
            (gradient,) = torch.autograd.grad((sample * label).sum(), model.get_parameter(name), retain_graph=True)
            total = total + gradient.double().square()
    return total


def test_it_is_the_square_of_the_gradient_of_each_token():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(80, 24), nn.Tanh(), nn.Linear(24, 5))
    batches = [torch.randn(6, 80), torch.randn(3, 80)]
    fisher = surveyed(model, batches)._fisher["0"]
    exact_RC = by_token(model, "0.weight", batches)
    assert fisher.tokens == 9
    assert_close(fisher.sum_PC[0], exact_RC.sum(0), rtol=1e-4, atol=0)
    pieces = [piece.sum(1) for piece in exact_RC.split(PIECE, 1)]  # the last one is smaller
    assert_close(fisher.sum_RK, torch.stack(pieces, 1), rtol=1e-4, atol=0)
    assert_close(fisher.value().double().sum(1), exact_RC.sum(1), rtol=1e-4, atol=0)
    spread = torch.cat([piece.sum(0) / piece.sum() for piece in exact_RC.split(PIECE, 1)])
    assert_close(fisher.value()[7].double(), torch.cat([piece[7].sum() * torch.ones(piece.shape[1])
                 for piece in exact_RC.split(PIECE, 1)]).double() * spread, rtol=1e-4, atol=0)  # fmt: skip


def test_places_of_grouped_convolutions_are_tokens():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 2, groups=2), nn.Conv2d(6, 3, 3))  # the second one has one place
    batches = [torch.randn(3, 4, 4, 4)]
    sensitivities = surveyed(model, batches)
    exact_RC = by_token(model, "1.weight", batches).flatten(1)
    assert_close(sensitivities._fisher["1"].sum_PC[0], exact_RC.sum(0), rtol=1e-4, atol=0)
    first = sensitivities._fisher["0"]
    assert first.tokens == 27
    assert first.sum_PC.shape == (2, 8)
    hidden = model[0](batches[0]).detach().requires_grad_()
    noise = torch.randn(3, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad((model[1](hidden) * noise).sum(), hidden)
    windows = nn.functional.unfold(batches[0][:, 2:], 2)  # of the second group
    expected = torch.einsum("brn,bcn->rc", gradient[:, 3:].flatten(2).square(), windows.square())
    assert_close(first.sum_PC[1], expected.sum(0).double(), rtol=1e-4, atol=0)
    assert_close(first.sum_RK[3:, 0], expected.sum(1).double(), rtol=1e-4, atol=0)


def test_blocks_that_are_computed_again_give_the_same():
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(3)])
    batches = [torch.randn(5, 8)]
    plain, again = (surveyed(model, batches, walk=walk).state_dict() for walk in ("whole", "auto"))
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[key], again[key]) for key in plain)
    assert int(plain["tokens.1.2"]) == 5


def test_activations_that_work_in_place_change_nothing():
    torch.manual_seed(0)
    layers = [nn.Linear(8, 8), nn.Linear(8, 3)]
    states = [
        surveyed(nn.Sequential(layers[0], nn.ReLU(inplace=inplace), layers[1]), [torch.ones(5, 8)]).state_dict()
        for inplace in (False, True)
    ]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert float(states[1]["sum_RK.0"].sum()) > 0


def test_parts_add_up_to_the_whole():
    torch.manual_seed(0)
    X_PNC, g_NR = torch.randn(1, 12, 40), torch.randn(12, 6)
    whole, parts = Fisher(6, 40), Fisher(6, 40)
    whole.update(X_PNC, g_NR)
    for rows in (slice(0, 5), slice(5, 12)):
        parts.update(X_PNC[:, rows], g_NR[rows])
    assert_close(parts.value(), whole.value())
    assert_close(parts.columns(), whole.columns())


@pytest.mark.parametrize("bits", [4, 6])
def test_rounding_costs_what_is_predicted(bits):
    """KL of a softmax layer, whose Hessian is Fisher's matrix; labels are drawn from it, hence some noise."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 12, bias=False)
    inputs = torch.randn(4000, 64)
    sensitivities = surveyed(nn.Sequential(layer), [inputs], "classes")
    args = QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy="group", group_size=32)
    fisher, W_RC = sensitivities._fisher["0"], layer.weight.detach()
    predicted = predicted_loss(W_RC, fisher.value(), fisher.columns(), QuantizationScheme(targets=["0"], weights=args))
    scale, zero_point = find_scales(W_RC, args, "hessian", fisher.columns())
    Q_RC = round_weight(W_RC, scale, zero_point, args)
    dense, rounded = (inputs @ M_RC.T for M_RC in (W_RC, Q_RC))
    divergence = (dense.softmax(1) * (dense.log_softmax(1) - rounded.log_softmax(1))).sum()
    assert predicted == pytest.approx(float(divergence), rel=0.25)
    assert predicted_loss(W_RC, fisher.value(), fisher.columns(), None) == 0
