"""Embeddings as targets: rounded row by row to nearest, refused where that cannot be."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lightning_compress import (
    AutoRoundModifier,
    AWQModifier,
    GPTQModifier,
    QATModifier,
    QuantizationModifier,
    SparseGPTModifier,
    compress,
)
from lightning_compress.calibration import calibrate
from lightning_compress.core import Event, EventType, Lifecycle, State
from lightning_compress.quant.record import Quantized
from tests.support.architecture_models import ARCHITECTURES

BOTH = {"targets": ["Embedding", "Linear"], "scheme": "W4A16", "group_size": 8}


class Tagger(nn.Module):
    """Tokens and bags of tokens through a small net; ``twin`` looks up the table of ``words``."""

    def __init__(self, shared: bool = False, **options):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(24, 16, **options)
        self.twin = nn.Embedding(24, 16)
        self.bag = nn.EmbeddingBag(24, 16)
        self.out = nn.Linear(16, 8)
        if shared:
            self.twin.weight = self.words.weight

    def forward(self, tokens):
        return self.out(self.words(tokens) + self.twin(tokens) + self.bag(tokens)[:, None])


def tokens(count=3):
    return [torch.randint(24, (4, 6), generator=torch.Generator().manual_seed(i)) for i in range(count)]


def nearest(W, group=8, factor=1.0):
    """4-bit codes in groups along the features of each row, by definition, with scales ``factor`` times min-max."""
    blocks = W.unflatten(1, (-1, group))
    scale = factor * blocks.abs().amax(-1, keepdim=True) / 7.5
    return ((blocks / scale).round().clamp(-8, 7) * scale).flatten(1)


def test_each_row_goes_to_nearest_in_groups_of_its_features():
    model = Tagger()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    targets = ["Embedding", "EmbeddingBag", "Linear"]
    ledger = compress(model, QuantizationModifier(**BOTH | {"targets": targets}), None)
    for name in ("words", "twin", "bag"):
        weight = model.get_submodule(name).weight.detach()
        assert_close(weight, nearest(before[f"{name}.weight"]), rtol=0, atol=1e-6)
        assert Quantized.of(model.get_submodule(name)).scale.shape == (24, 2)
    row = next(row for row in ledger if row.module == "words")
    assert row.scheme == "W4A16 g8 sym"
    assert row.flags == ["an embedding: rounded to nearest, scales by minmax"]
    assert row.bits == 4 + 32 / 8 + 16 * 8 / (24 * 16)


@pytest.mark.parametrize(
    "modifier",
    [GPTQModifier(**BOTH), QuantizationModifier(**BOTH, scale_search="imatrix")],
    ids=lambda m: type(m).__name__,
)
def test_what_weighs_inputs_takes_least_squares_for_rows_that_are_looked_up(modifier):
    """Against a dense grid of scales for each group."""
    model = Tagger()
    before = model.words.weight.detach().clone()
    ledger = compress(model, modifier, tokens())
    tried = torch.stack([nearest(before, 8, f) for f in torch.linspace(0.5, 1.2, 400).tolist()])
    best = (tried - before).square().unflatten(-1, (-1, 8)).sum(-1).amin(0).sum()
    error = (model.words.weight.detach() - before).square().sum()
    assert best * (1 - 1e-4) <= error <= 1.05 * best
    assert error < 0.95 * (nearest(before) - before).square().sum()
    flags = {row.module: row.flags for row in ledger}
    assert flags["words"] == ["an embedding: rounded to nearest, scales by least squares"]
    assert flags["out"] == []


def test_what_comes_after_sees_the_rounded_rows():
    """The head's inputs in calibration are those of the quantized table: GPTQ on it is GPTQ on them."""
    model, ARCH = ARCHITECTURES["llama"].build(), ARCHITECTURES["llama"]
    compress(model, GPTQModifier(**BOTH | {"ignore": ["lm_head"]}), ARCH.batches())
    again = ARCH.build()
    again.model.embed_tokens.weight.data.copy_(model.model.embed_tokens.weight.detach())
    compress(again, GPTQModifier(scheme="W4A16", group_size=8, ignore=["lm_head"]), ARCH.batches())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name


@pytest.mark.parametrize("kind", [QuantizationModifier, GPTQModifier])
def test_embeddings_with_one_table_are_rounded_once(kind):
    model = Tagger(shared=True)
    before = model.words.weight.detach().clone()
    ledger = compress(model, kind(**BOTH, scale_search="minmax"), tokens())
    assert model.twin.weight is model.words.weight
    assert_close(model.words.weight.detach(), nearest(before), rtol=0, atol=1e-6)
    assert Quantized.of(model.twin) is Quantized.of(model.words)
    flags = {row.module: row.flags for row in ledger}
    assert flags["twin"] == ["looks its rows up in the table of words"]


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("kind", [QuantizationModifier, GPTQModifier, QATModifier])
def test_a_table_that_is_the_head_too_is_refused_with_what_to_do(name, kind):
    model = ARCHITECTURES[name].build()
    targets = ["re:.*(embed_tokens|shared|wte|word_embeddings)$"]
    with pytest.raises(ValueError, match=r"shared with '.*untie the two: give one of them a copy.*tie_word_embeddings"):
        Lifecycle([kind(**BOTH | {"targets": targets})]).initialize(State(model=model))
    assert not Quantized.find(model)


def test_untied_as_the_message_says_the_head_stays_as_it_was():
    model = ARCHITECTURES["gpt2"].build()
    head = model.lm_head
    head.weight = nn.Parameter(head.weight.detach().clone())
    before = head.weight.detach().clone()
    compress(model, QuantizationModifier(targets=["Embedding"], scheme="W4A16", group_size=8), None)
    assert torch.equal(head.weight, before)
    assert sorted(Quantized.find(model)) == ["transformer.wpe", "transformer.wte"]


@pytest.mark.parametrize(
    ("modifier", "options", "message"),
    [
        (AWQModifier(**BOTH), {}, r"cannot quantize 'words' \(Embedding\), 'twin' \(Embedding\): .*embeddings: Q"),
        (AutoRoundModifier(**BOTH), {}, r"cannot quantize 'words' .*embeddings: QuantizationModifier, GPTQModifier or"),
        (SparseGPTModifier(targets=["Embedding"], sparsity=0.5), {}, "Embedding"),
        (QuantizationModifier(targets=["Embedding"], scheme="W8A8"), {}, "the inputs of 'words', 'twin' are numbers"),
        (GPTQModifier(**BOTH), {"max_norm": 1.0}, "max_norm of 'words' rescales rows in place"),
        (QATModifier(**BOTH), {"shared": True}, "the weight of 'words' is shared with 'twin.weight'"),
        (QATModifier(**BOTH), {"sparse": True}, "gradient of 'words' is sparse.*sparse=False"),
        (QuantizationModifier(**BOTH | {"group_size": 32}), {}, "group_size=32 is larger than the input columns of"),
    ],
    ids=lambda v: type(v).__name__ if hasattr(v, "name") else "",
)  # fmt: skip
def test_what_cannot_be_is_refused_at_set_up(modifier, options, message):
    with pytest.raises(ValueError, match=message):
        Lifecycle([modifier]).initialize(State(model=Tagger(**options)))


def test_one_table_with_two_schemes_is_refused():
    modifier = QuantizationModifier(config_groups={"W4A16": ["words"], "W8A16": ["twin"]})
    with pytest.raises(ValueError, match="shared with"):
        Lifecycle([modifier]).initialize(State(model=Tagger(shared=True)))


@pytest.mark.parametrize("gradient", ["lsq", "ste"])
def test_training_looks_up_rows_on_their_grid_and_leaves_them_there(gradient):
    model, batches = Tagger(padding_idx=0).train(), tokens(6)
    modifier = QATModifier(**BOTH, gradient=gradient)
    lifecycle = Lifecycle([modifier])
    lifecycle.initialize(State(model=model))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, lifecycle, batches)
    moved = model.words.parametrizations.weight.original.detach() - before["words.parametrizations.weight.original"]
    seen = torch.stack(batches).unique()
    assert set(moved.abs().sum(1).nonzero()[:, 0].tolist()) == set(seen.tolist()) - {0}  # 0 is padding
    model.eval()
    with torch.no_grad():
        wanted = model(batches[0])
        lifecycle.finalize(State(model=model))
        assert torch.equal(model(batches[0]), wanted)
    record = Quantized.of(model.words)
    codes = model.words.weight.detach().unflatten(1, (-1, 8)) / record.scale[..., None]
    assert_close(codes, codes.round(), rtol=0, atol=1e-4)


def test_training_goes_on_from_a_table_that_gptq_rounded():
    """It hands over the values before rounding: fake-quantized they are the table it left."""
    model, alone = Tagger(), Tagger()
    compress(alone, GPTQModifier(**BOTH), tokens())
    lifecycle = Lifecycle([GPTQModifier(**BOTH, start=0), QATModifier(**BOTH, start=0)])
    lifecycle.initialize(State(model=model))
    calibrate(lifecycle.handing_over(Event(EventType.BATCH_START)), State(model=model), tokens())
    lifecycle.modifiers[0].note_handed_over()
    assert torch.equal(model.words.weight, alone.words.weight)
    assert torch.equal(model.words.parametrizations.weight.original, Tagger().words.weight)
    train(model, lifecycle, tokens())
    assert not torch.equal(model.words.weight, alone.words.weight)


def train(model, lifecycle, batches):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = State(model=model, optimizer=optimizer)
    for step, batch in enumerate(batches):
        optimizer.zero_grad()
        lifecycle.emit(state, Event(EventType.BATCH_START, step, global_batch=step, total_steps=len(batches)))
        model(batch).square().mean().backward()
        optimizer.step()
        lifecycle.emit(state, Event(EventType.BATCH_END, step + 1, global_batch=step, total_steps=len(batches)))
