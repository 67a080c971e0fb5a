"""The life that layer-wise techniques share, seen through a technique that takes one step of gradient descent."""

from typing import Any, ClassVar

import pytest
import torch
from pydantic import PrivateAttr
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_compress import compress
from lightning_compress.core import Needs
from lightning_compress.layers.matching import select
from lightning_compress.layers.matrix import as_matrix, inputs_as_rows, write_matrix
from lightning_compress.layerwise.layer import Hessian, Layer, Solved
from lightning_compress.layerwise.modifier import LayerwiseModifier


class HalvingModifier(LayerwiseModifier):
    """W - W H / (2 max H_jj); keeps what it was asked to solve."""

    technique: ClassVar[str] = "halving"
    needs: ClassVar[Needs] = Needs(data=True, one_pass=True)

    targets: list[str] = ["Linear"]
    share_inputs: bool = True
    hold_out: bool = False
    _problems: list[tuple[str, Tensor, Hessian]] = PrivateAttr(default_factory=list)
    _prepare_calls: list[list[str]] = PrivateAttr(default_factory=list)
    _missed: list[str] = PrivateAttr(default_factory=list)

    @property
    def holds_out(self) -> bool:
        return self.hold_out

    def find_layers(self, model: nn.Module) -> dict[str, nn.Module]:
        return select(model, self.targets)

    def prepare(self, hessian: Hessian, layers: Any) -> Hessian:
        self._prepare_calls.append([layer.name for layer in layers])
        return hessian

    def solve(self, layer: Layer, hessian: Hessian) -> Solved:
        self._problems.append((layer.name, layer.W_RC.clone(), hessian))
        D_RC = layer.W_RC @ hessian.H_CC / (2 * hessian.H_CC.diagonal().max())
        error = float(((D_RC @ hessian.H_CC) * D_RC).sum())
        return Solved(layer.W_RC - D_RC, error, float(((layer.W_RC @ hessian.H_CC) * layer.W_RC).sum()), "halved")

    def write(self, layer: Layer, solved: Solved) -> dict[str, Any]:
        write_matrix(layer.module, solved.W_RC)
        return {"params": layer.W_RC.numel()}

    def unseen(self, state: Any, layers: dict[str, nn.Module]) -> None:
        self._missed += layers


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o, self.spare = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.q(x) * self.k(x))


def test_layers_with_one_input_share_a_hessian_and_each_is_solved_once():
    model, x = Attention(), [torch.randn(2, 5, 6) for _ in range(3)]
    dense, modifier = {n: m.weight.detach().clone() for n, m in model.named_children()}, HalvingModifier()
    ledger = compress(model, modifier, x)
    assert [name for name, *_ in modifier._problems] == ["q", "k", "o"]
    assert modifier._prepare_calls == [["q"], ["o"]]
    X = torch.cat(x).flatten(0, 1)
    H = X.t() @ X / len(X)
    for name in "qk":
        expected = dense[name] - dense[name] @ H / (2 * H.diagonal().max())
        assert_close(model.get_submodule(name).weight, expected)
    assert modifier._missed == ["spare"]
    assert torch.equal(model.spare.weight, dense["spare"])
    rows = {row.module: row for row in ledger}
    assert [rows[n].tokens for n in "qko"] == [30, 30, 30]
    D = model.q.weight.detach() - dense["q"]
    assert rows["q"].error == pytest.approx(
        float(((D @ H) * D).sum() / ((dense["q"] @ H) * dense["q"]).sum()), rel=1e-5
    )
    assert (rows["q"].params, rows["q"].flags) == (36, ["halved"])
    assert not modifier.hooked


@pytest.mark.parametrize(
    "conv", [nn.Conv1d(6, 6, 2, groups=3), nn.Conv2d(4, 8, 3, groups=2, padding=1)], ids=["1d", "2d"]
)
def test_each_partition_of_a_convolution_is_a_problem_of_its_own(conv):
    x = [torch.randn(2, conv.in_channels, *[7] * (conv.weight.ndim - 2)) for _ in range(2)]
    dense, modifier, P = as_matrix(conv).clone(), HalvingModifier(targets=[type(conv).__name__]), conv.groups
    ledger = compress(nn.Sequential(conv), modifier, x)
    X_PNC = torch.cat([inputs_as_rows(conv, one) for one in x], 1)
    assert [problem[1].shape[0] for problem in modifier._problems] == [len(dense) // P] * P
    joined, error, energy = [], 0.0, 0.0
    for W, X in zip(dense.chunk(P), X_PNC, strict=True):
        H = X.t() @ X / len(X)
        D = W @ H / (2 * H.diagonal().max())
        error, energy = error + float(((D @ H) * D).sum()), energy + float(((W @ H) * W).sum())
        joined.append(W - D)
    assert_close(as_matrix(conv), torch.cat(joined))
    (row,) = ledger
    assert row.error == pytest.approx(error / energy, rel=1e-5)
    assert row.flags == ["halved"]


def test_halves_are_those_of_every_second_batch_and_h_counts_both():
    x, modifier = [torch.randn(4, 3) for _ in range(4)], HalvingModifier(hold_out=True)
    compress(nn.Sequential(nn.Linear(3, 2)), modifier, x)
    [(_, _, hessian)] = modifier._problems
    assert hessian.halves is not None
    for half, batches in zip(hessian.halves, (x[::2], x[1::2]), strict=True):
        X = torch.cat(batches)
        assert_close(half, X.t() @ X / len(X))
    assert_close(hessian.H_CC, torch.cat(x).t() @ torch.cat(x) / 16)
    assert (hessian.tokens, hessian.layers) == (16, ["0"])


def test_without_sharing_each_layer_has_a_hessian_of_its_own():
    modifier = HalvingModifier(share_inputs=False, targets=["q", "k", "o"])
    compress(Attention(), modifier, [torch.randn(1, 4, 6)])
    assert modifier._prepare_calls == [["q"], ["k"], ["o"]]
    assert modifier._missed == []


def test_padding_is_left_out_of_the_hessian():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, inputs: Tensor, attention_mask: Tensor) -> Tensor:
            return self.layer(inputs)

    x, mask = torch.randn(2, 5, 3), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    modifier = HalvingModifier()
    compress(Net(), modifier, [{"inputs": x, "attention_mask": mask}])
    [(_, _, hessian)] = modifier._problems
    X = x[mask.bool()]
    assert_close(hessian.H_CC, X.t() @ X / 6)
    assert hessian.tokens == 6
