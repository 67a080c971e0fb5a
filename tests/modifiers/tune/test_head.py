"""Logits in pieces: the same divergence and gradients as from whole ones, and never more tokens than a piece has."""

import pytest
import torch
from torch import nn

from lightning_compress import QuantizationModifier, TuneModifier, compress
from lightning_compress.modifiers.distillation import divergence
from lightning_compress.modifiers.tune import head as heads
from lightning_compress.modifiers.tune.head import Call, Head, by_pieces
from tests.modifiers.tune.test_modifier import W2, ids, llama

SIZE = 7  # tokens of a piece


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(heads, "tokens_at_once", lambda classes, device: SIZE)


def test_pieces_give_the_values_and_gradients_of_the_whole(small_pieces):
    torch.manual_seed(0)
    x, answer, layer = torch.randn(3 * SIZE + 2, 8), torch.randn(3 * SIZE + 2, 1), nn.Linear(8, 5)
    sizes = []

    def distance(x, answer):
        sizes.append(len(x))
        return (layer(x).logsumexp(-1) - answer[:, 0]).square()

    gradients = []
    for run in (lambda x: by_pieces(distance, 5, x, answer), lambda x: distance(x, answer)):
        leaf = x.clone().requires_grad_()
        value = run(leaf)
        gradients.append((value.detach(), *torch.autograd.grad(value.mean(), [leaf, layer.weight])))
    torch.testing.assert_close(*gradients)
    assert sizes == [7, 7, 7, 2, 2, 7, 7, 7, 23]  # a second time in the backward pass, then the whole


def test_the_likeliest_classes_are_found_by_pieces_bit_for_bit(monkeypatch):
    logits = torch.randn(3, 11, 50, generator=torch.Generator().manual_seed(0))
    whole = divergence.top_logits(logits, 6)
    monkeypatch.setattr(divergence, "PIECE", 4 * 50)
    for one, other in zip(divergence.top_logits(logits, 6), whole, strict=True):
        assert one.shape == other.shape
        assert torch.equal(one.float(), other.float())
    assert divergence.tokens_at_once(10**9, torch.device("cpu")) == 1


class Net(nn.Module):
    """With something between its last Linear and what it returns."""

    def __init__(self, after):
        super().__init__()
        self.body, self.last, self.after = nn.Linear(6, 6), nn.Linear(6, 4), after

    def forward(self, x):
        return self.after(self.last(self.body(x)))


AFTER = {
    "nothing": (lambda logits: logits, True),
    "a view of all": (lambda logits: logits[:], True),
    "a factor": (lambda logits: logits / 2, False),
    "a factor in place": (lambda logits: logits.div_(2), False),
    "some tokens": (lambda logits: logits[1:], False),
    "another layout": (lambda logits: logits.t(), False),
}


@pytest.mark.parametrize("case", AFTER)
def test_only_logits_that_are_returned_as_they_are_count(case):
    after, unchanged = AFTER[case]
    model, x, calls = Net(after), torch.randn(5, 6), []
    handle = model.last.register_forward_hook(lambda module, args, output: calls.append(Call(module, output)))
    with torch.no_grad():
        logits = model(x)
        assert calls[0].gave(logits) is unchanged
        handle.remove()
        part = Head(model.last)
        if case != "a factor in place":  # zeros without memory cannot be written to: such a head is not taken before
            stored = part.input_of(lambda: model(x), lambda output: output)
            assert (stored is not None) is unchanged
            if unchanged:
                torch.testing.assert_close(part.run(stored), model.last(model.body(x)))
        assert "forward" not in vars(model.last)


class Recording(nn.Linear):
    """Notes how many tokens it runs on."""

    def forward(self, x):
        self.sizes.append(x.numel() // x.shape[-1])
        return super().forward(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tuning_never_makes_whole_logits(small_pieces, dtype):
    """After the survey and the probe the head runs on pieces; the result is that of whole logits."""
    losses = {}
    for case in ("pieces", "whole"):
        model = llama(dtype)
        head = model.lm_head
        head.__class__, head.sizes = Recording, []
        if case == "whole":
            head.register_forward_hook(lambda module, args, output: None)  # a hook must see what the model returns
        ledger = compress(model, [QuantizationModifier(**W2), TuneModifier(epochs=1)], ids(4))
        losses[case] = ledger.rows[-1].error
        tokens, count = ids()[0]["input_ids"].numel(), 4
        assert head.sizes[:count] == [tokens] * count
        if case == "pieces":
            assert max(head.sizes[count:]) == SIZE
            assert sum(head.sizes[count:]) == tokens * (1 + 2 * 3 + 1)  # held out twice, three that train
    assert losses["pieces"] == pytest.approx(losses["whole"], rel=1e-5 if dtype == torch.float32 else 2e-2)
