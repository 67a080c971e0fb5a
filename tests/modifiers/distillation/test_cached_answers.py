"""A cached teacher answers once per sample, and the loss is that of the teacher's top logits to the last bit."""

import copy
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_compress.core import Event, EventType, Ledger, Lifecycle, State
from lightning_compress.modifiers.distillation.modifier import DistillationModifier
from tests.support.training_loop import network

E = EventType
SAMPLES, BATCH = 24, 8


class Counting(nn.Module):
    """A teacher that counts its forwards."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return self.inner(*args, **kwargs)


def samples(seed=0):
    return torch.randn(SAMPLES, 16, generator=torch.Generator().manual_seed(seed))


def run(
    modifier, epochs, *, data=lambda epoch: samples(), order=None, ledger=None, model=None, lifecycle=None, first=0
):
    """Losses of every batch; the order of samples is another one in each epoch."""
    model = model or network(0)
    state = State(model=model, ledger=Ledger() if ledger is None else ledger)
    if lifecycle is None:
        lifecycle = Lifecycle([modifier])
        lifecycle.initialize(state)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    per_epoch, losses = SAMPLES // BATCH, []
    for step in range(first, epochs * per_epoch):
        epoch, place = divmod(step, per_epoch)
        shuffled = (order or (lambda epoch: torch.arange(SAMPLES)))(epoch)
        x = data(epoch)[shuffled[place * BATCH : (place + 1) * BATCH]]
        clock = {"steps_per_epoch": per_epoch, "total_steps": epochs * per_epoch}
        lifecycle.emit(state, Event(E.BATCH_START, step, **clock))
        loss = F.cross_entropy(model(x), torch.arange(BATCH))
        lifecycle.emit(state.but(loss=loss), Event(E.LOSS_CALCULATED, step, **clock))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        lifecycle.emit(state, Event(E.OPTIM_PRE_STEP, step, **clock))
        optimizer.step()
        lifecycle.emit(state, Event(E.OPTIM_POST_STEP, step + 1, **clock))
        lifecycle.emit(state, Event(E.BATCH_END, step + 1, **clock))
    return losses, lifecycle, state


def distil(teacher, **options):
    return DistillationModifier(teacher=teacher, weight=0.7, **options)


def shuffle(epoch):
    return torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(epoch))


@pytest.mark.parametrize("options", [{}, {"divergence": "jsd", "temperature": 3.0}, {"divergence": "reverse"}], ids=str)
def test_a_cached_run_has_the_losses_of_an_uncached_top_k_run(tmp_path, options):
    teacher = Counting(network(1))
    expected, _, _ = run(distil(teacher, top_k=3, **options), 3)
    assert teacher.calls == 9
    teacher.calls, ledger = 0, Ledger()
    cached, lifecycle, state = run(distil(teacher, top_k=3, cache_dir=str(tmp_path), **options), 3, ledger=ledger)
    assert cached == expected
    assert teacher.calls == 3  # one epoch of three batches
    lifecycle.finalize(state)
    (row,) = ledger
    assert row.technique == "distillation"
    assert re.fullmatch(r"teacher cache: 48 hits, 24 misses, 24 samples in 0.\d MiB", row.flags[0])

    teacher.calls = 0  # the next run finds all of it
    again, _, _ = run(distil(teacher, top_k=3, cache_dir=str(tmp_path), **options), 3)
    assert again == expected
    assert teacher.calls == 0


def test_a_loader_that_shuffles_still_hits(tmp_path):
    teacher = Counting(network(1))
    expected, _, _ = run(distil(teacher, top_k=3), 3, order=shuffle)
    teacher.calls = 0
    cached, _, _ = run(distil(teacher, top_k=3, cache_dir=str(tmp_path)), 3, order=shuffle)
    assert teacher.calls == 3
    assert cached == pytest.approx(expected, rel=1e-5)  # in another batch a matmul may round otherwise


def test_all_classes_are_kept_where_there_are_fewer_than_the_default(tmp_path):
    """8 classes, and a cache keeps 64: the whole divergence, but for float16."""
    whole, _, _ = run(distil(network(1)), 2)
    cached, _, _ = run(distil(network(1), cache_dir=str(tmp_path)), 2)
    assert cached == pytest.approx(whole, rel=1e-3)


def test_augmented_inputs_give_a_warning_with_numbers_and_end_the_writing(tmp_path):
    modifier = distil(network(1), top_k=3, cache_dir=str(tmp_path))
    said = r"helps little: in epoch 2 it had 0 of 24 samples, .*no more answers are written"
    with pytest.warns(UserWarning, match=said) as told:
        _, lifecycle, state = run(modifier, 4, data=samples)
    assert len([w for w in told if "helps little" in str(w.message)]) == 1
    lifecycle.finalize(state)
    assert "0 hits, 96 misses, 48 samples" in state.ledger.rows[0].flags[0]


def test_a_cache_that_helps_says_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, lifecycle, state = run(distil(network(1), top_k=3, cache_dir=str(tmp_path)), 3)
        lifecycle.finalize(state)


def test_a_cache_that_will_not_fit_is_a_warning_at_the_first_batch(tmp_path):
    modifier = distil(network(1), top_k=3, cache_dir=str(tmp_path), cache_limit_gib=5e-7)
    teacher_runs = Counting(network(1))
    with pytest.warns(UserWarning, match="the teacher cache") as told:
        losses, _, _ = run(modifier, 3)
    first = str(told[0].message)
    assert "would take about 0.00 GiB (24 samples of an epoch, 0.1 KiB each), and cache_limit_gib=5e-07" in first
    assert "raise the limit" in first
    expected, _, _ = run(distil(teacher_runs, top_k=3), 3)
    assert losses == expected  # what did not fit was asked of the teacher


def test_a_run_that_resumes_finds_what_was_computed_before_its_checkpoint(tmp_path):
    whole, _, _ = run(distil(network(1), top_k=3, cache_dir=str(tmp_path / "whole")), 3, order=shuffle)

    teacher, model = Counting(network(1)), network(0)
    half, lifecycle, _ = run(distil(teacher, top_k=3, cache_dir=str(tmp_path / "cut")), 1, order=shuffle, model=model)
    saved = copy.deepcopy(lifecycle.state_dict())  # then the process is killed
    teacher.calls = 0
    second = Lifecycle([distil(teacher, top_k=3, cache_dir=str(tmp_path / "cut"))])
    second.initialize(State(model=model))
    second.load_state_dict(saved)
    ledger = Ledger()
    rest, _, state = run(None, 3, order=shuffle, model=model, lifecycle=second, first=3, ledger=ledger)
    assert half + rest == whole
    assert teacher.calls == 0
    second.finalize(state)
    assert "48 hits, 24 misses" in ledger.rows[0].flags[0]


def test_padding_changes_with_the_batch_and_samples_still_hit(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    student, teacher = (transformers.LlamaForCausalLM(config) for _ in range(2))
    texts = [torch.randint(0, 50, (n,), generator=torch.Generator().manual_seed(n)) for n in (3, 5, 7, 4)]

    def losses(modifier, orders):
        lifecycle, state = Lifecycle([modifier]), State(model=student)
        lifecycle.initialize(state)
        found = []
        for i, j in orders:
            length = max(len(texts[i]), len(texts[j]))
            ids = torch.stack([F.pad(texts[n], (0, length - len(texts[n]))) for n in (i, j)])
            mask = torch.stack([F.pad(torch.ones_like(texts[n]), (0, length - len(texts[n]))) for n in (i, j)])
            lifecycle.emit(state, Event(E.BATCH_START))
            loss = student(input_ids=ids, attention_mask=mask).logits.sum() * 0
            lifecycle.emit(state.but(loss=loss), Event(E.LOSS_CALCULATED))
            lifecycle.emit(state, Event(E.BATCH_END))
            found.append(loss.item())
        return found

    pairs = [(0, 1), (2, 3), (0, 2), (3, 1), (1, 0)]
    counting = Counting(teacher)
    expected = losses(DistillationModifier(teacher=teacher, top_k=5), pairs)
    cached = losses(DistillationModifier(teacher=counting, top_k=5, cache_dir=str(tmp_path)), pairs)
    assert counting.calls == 2
    assert cached == pytest.approx(expected, rel=1e-4)


def test_maps_of_classes_per_pixel_are_cached_too(tmp_path):
    torch.manual_seed(0)
    student, teacher = nn.Conv2d(3, 5, 1), Counting(nn.Conv2d(3, 5, 1))
    x = torch.randn(2, 3, 4, 4)
    found = []
    for options in ({}, {"top_k": 5}, {"cache_dir": str(tmp_path)}, {"cache_dir": str(tmp_path)}):
        lifecycle, state = Lifecycle([distil(teacher, class_dim=1, **options)]), State(model=student)
        lifecycle.initialize(state)
        lifecycle.emit(state, Event(E.BATCH_START))
        loss = student(x).sum() * 0
        lifecycle.emit(state.but(loss=loss), Event(E.LOSS_CALCULATED))
        found.append(loss.item())
        lifecycle.emit(state, Event(E.BATCH_END))
        lifecycle.finalize(state)
    p, q = teacher.inner(x).softmax(1), student(x).softmax(1)
    assert found[0] == pytest.approx(0.7 * (p * (p / q).log()).sum(1).mean().item(), rel=1e-5)
    assert found[1] == pytest.approx(found[0], rel=1e-3)
    assert found[1] == found[2] == found[3]
    assert teacher.calls == 3


def test_bad_arguments_of_the_cache_are_refused(tmp_path):
    cached = {"cache_dir": str(tmp_path)}
    for arguments, message in [
        ({"hidden": {"0": "0"}, **cached}, "cache_dir keeps logits: hidden and attention_weight need the teacher"),
        ({"divergence": None, "attention_weight": 1.0, **cached}, "cache_dir keeps logits"),
        ({"temperature": 0.4, **cached}, "temperature=0.4 with top_k or cache_dir: at least 0.5"),
        ({"top_k": 0}, "top_k=0"),
        ({"cache_limit_gib": 0}, "cache_limit_gib=0"),
        ({"teacher": F.relu, **cached}, "cache_dir needs a teacher that is a module or a file"),
    ]:
        with pytest.raises(ValueError, match=message):
            Lifecycle([DistillationModifier(**arguments)]).initialize(State(model=network()))
    with pytest.raises(ValueError, match="top_k=9: the teacher has 8 classes"):
        run(distil(network(1), top_k=9), 1)


def test_a_teacher_that_answers_nan_is_not_written_down(tmp_path):
    teacher = network(1)
    with torch.no_grad():
        teacher[2].bias[3] = float("nan")
    with pytest.raises(ValueError, match="the distillation loss is nan at step 0: expected a finite number"):
        run(distil(teacher, top_k=3, cache_dir=str(tmp_path)), 1)
    assert not list(tmp_path.rglob("*.safetensors"))
