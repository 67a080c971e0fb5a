"""How a batch enters a model, and what is refused or named before it does."""

import re
import warnings
from collections import UserDict
from types import SimpleNamespace
from typing import TypedDict, Unpack

import pytest
import torch
from torch import nn

from lightning_compress import GPTQModifier, compress
from lightning_compress.calibration.inputs import IN_TRAINER, check_batch, run_model


class Echo(nn.Module):
    """Returns what it was called with."""

    def __init__(self, **config):
        super().__init__()
        if config:
            self.config = SimpleNamespace(**config)

    def forward(self, *args, **kwargs):
        return args, kwargs


class Named(Echo):
    def forward(self, input_ids, attention_mask=None, labels=None, use_cache=None):
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, "use_cache": use_cache}


class Further(Echo):
    def forward(self, input_ids, **further):
        return {"input_ids": input_ids, **further}


class Keys(TypedDict, total=False):
    position_ids: int


class Typed(Echo):
    def forward(self, input_ids, **further: Unpack[Keys]):
        return {"input_ids": input_ids, **further}


class TypedInWords(Echo):
    def forward(self, input_ids, **further: "Unpack[Keys]"):
        return {"input_ids": input_ids, **further}


class NeedsLabels(Echo):
    def forward(self, input_ids, labels):
        return {"input_ids": input_ids, "labels": labels}


BATCH = {"input_ids": 1, "attention_mask": 2, "labels": 3, "position_ids": 4}
EMPTY = {"input_ids": None, "attention_mask": None, "labels": None, "use_cache": None}


@pytest.mark.parametrize(
    ("model", "batch", "expected"),
    [
        (Named(), UserDict(BATCH), EMPTY | {"input_ids": 1, "attention_mask": 2}),
        (Named(use_cache=True), BATCH, EMPTY | {"input_ids": 1, "attention_mask": 2, "use_cache": False}),
        (Named(is_encoder_decoder=True), BATCH, EMPTY | {"input_ids": 1, "attention_mask": 2, "labels": 3}),
        (Further(), BATCH, {"input_ids": 1, "attention_mask": 2, "position_ids": 4}),
        (Further(use_cache=True), BATCH, {"input_ids": 1, "attention_mask": 2, "position_ids": 4, "use_cache": False}),
        (Typed(), BATCH, {"input_ids": 1, "position_ids": 4}),
        (TypedInWords(), BATCH, {"input_ids": 1, "position_ids": 4}),
        (NeedsLabels(), BATCH, {"input_ids": 1, "labels": 3}),
        (Echo(), (5, 6), ((5,), {})),
        (Echo(), [{"x": 5, "labels": 1}, 6], ((), {"x": 5})),
        (Echo(use_cache=True), {"x": 5}, ((), {"x": 5, "use_cache": False})),
        (Echo(), 5, ((5,), {})),
    ],
)
def test_how_a_batch_enters(model, batch, expected):
    assert run_model(model, batch) == expected
    check_batch(model, batch)


def test_decoder_inputs_take_the_place_of_labels():
    class Decoder(Echo):
        def forward(self, input_ids, decoder_input_ids=None, labels=None):
            return decoder_input_ids, labels

    batch = {"input_ids": 1, "labels": 2, "decoder_input_ids": 3}
    assert run_model(Decoder(is_encoder_decoder=True), batch) == (3, None)


@pytest.mark.parametrize(
    ("model", "batch", "unused"),
    [
        (Named(), BATCH, "['position_ids']"),
        (Typed(), BATCH, "['attention_mask']"),
        (nn.Linear(4, 2), {"input": torch.zeros(1, 4), "label": 1, "name": "a"}, "['label', 'name']"),
        (Further(), BATCH, None),
        (Named(), {"input_ids": 1, "labels": 3}, None),
    ],
)
def test_keys_that_are_left_out_are_named_but_for_labels(model, batch, unused):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        check_batch(model, batch)
    name = type(model).__name__
    expected = f"calibration leaves the keys {unused} of a batch out: the forward of {name} does not take them; it gets"
    assert [str(w.message)[: len(expected)] for w in told] == ([] if unused is None else [expected])


@pytest.mark.parametrize("run", [run_model, check_batch])
@pytest.mark.parametrize(
    ("model", "batch", "said"),
    [
        (Named(), (), "a calibration batch is an empty tuple; expected the input first"),
        (
            nn.Linear(4, 2),
            {"image": 1},
            f"Linear.forward takes none of the batch's keys ['image'], but ['input']: {IN_TRAINER}",
        ),
    ],
)
def test_what_cannot_enter_is_refused(run, model, batch, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        run(model, batch, IN_TRAINER)


class Bare(nn.Module):
    def forward(self):
        pass


@pytest.mark.parametrize(
    ("model", "batch", "said"),
    [
        (Named(), {"use_cache": 2}, "missing a required argument: 'input_ids'; it would get the keywords"),
        (Bare(), torch.zeros(2, 3), "too many positional arguments; it would get its tensor [2, 3]"),
    ],
)
def test_the_signature_is_compared_before_anything_runs(model, batch, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        check_batch(model, batch)


@pytest.mark.parametrize(
    ("batch", "got"),
    [([torch.zeros(2, 3)], r"its tensor \[2, 3\]"), ({"input": torch.zeros(2, 3)}, r"the keywords \['input'\]")],
)
@pytest.mark.parametrize(("advice", "named"), [((), "forward=lambda"), ((IN_TRAINER,), "calibration_step")])
def test_a_batch_that_the_model_cannot_take_says_how_to_give_another(batch, got, advice, named):
    with pytest.raises(RuntimeError, match="cannot be multiplied") as raised:
        run_model(nn.Linear(4, 2), batch, *advice)
    (note,) = raised.value.__notes__
    assert re.search(rf"Linear on a calibration batch: it got {got}", note)
    assert named in note


class Outer(nn.Module):
    """Hands further keywords to the language model inside."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.config, self.seen = inner, inner.config, set()

    def forward(self, input_ids, **further):
        self.seen |= further.items() - {("attention_mask", further["attention_mask"])}
        return self.inner(input_ids, **further)


class Decorated(Outer):
    """As behind a decorator that forgets functools.wraps."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("outer", [Outer, Decorated])
def test_padding_is_masked_where_forward_hands_keywords_on(outer):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = torch.randint(3, 32, (4, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(4, 6, dtype=torch.long)
    mask[:2, :4] = 0
    batches = [{"input_ids": ids, "attention_mask": mask}] * 2

    def compressed(wrap, data):
        torch.manual_seed(0)
        inner = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, pad_token_id=0, **sizes))
        model = wrap(inner)
        compress(model, GPTQModifier(scheme="W4A16", group_size=-1, ignore=["re:.*lm_head"]), data)
        return inner.state_dict(), model

    (direct, _), (wrapped, model) = compressed(lambda inner: inner, batches), compressed(outer, batches)
    unmasked, _ = compressed(lambda inner: inner, [{"input_ids": ids}] * 2)
    assert all(torch.equal(wrapped[name], weight) for name, weight in direct.items())
    assert any(not torch.equal(unmasked[name], weight) for name, weight in direct.items())
    assert model.seen == {("use_cache", False)}
