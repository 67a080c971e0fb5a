"""Distillation adds the divergence that it states, from a teacher that never moves."""

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

from lightning_compress.core import Event, EventType, Lifecycle, State
from lightning_compress.modifiers.distillation.divergence import logit_divergence
from lightning_compress.modifiers.distillation.modifier import DistillationModifier
from lightning_compress.modifiers.qat import QATModifier
from tests.support.training_loop import network, train

E = EventType


def one_step(model, modifier, accumulate=1, x=None, y=None):
    """Task loss, the loss after LOSS_CALCULATED, and the gradients that it gives."""
    lifecycle, state = Lifecycle([modifier]), State(model=model)
    lifecycle.initialize(state)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 16, generator=generator) if x is None else x
    y = torch.randint(0, 8, (32,), generator=generator) if y is None else y
    model.train()
    lifecycle.emit(state, Event(E.BATCH_START))
    loss = F.cross_entropy(model(x), y) / accumulate
    before = loss.item()
    lifecycle.emit(state.but(loss=loss), Event(E.LOSS_CALCULATED, batches_per_step=accumulate))
    loss.backward()
    return before, loss.item(), lifecycle


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_loss_and_its_gradients_are_the_stated_mixture(kind, accumulate):
    model, teacher = network(0), network(1)
    expected = copy.deepcopy(model)
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(1))
    y = torch.arange(32) % 8
    modifier = DistillationModifier(teacher=teacher, weight=0.3, temperature=2.0, divergence=kind)
    _, mixed, _ = one_step(model, modifier, accumulate, x, y)

    divergence = logit_divergence(expected(x), teacher(x), 2.0, kind).mean()
    loss = (0.7 * F.cross_entropy(expected(x), y) + 0.3 * divergence) / accumulate
    loss.backward()
    assert mixed == pytest.approx(loss.item(), rel=1e-5)
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad)


def test_a_model_that_teaches_itself_adds_nothing_at_first():
    before, after, _ = one_step(network(), DistillationModifier(teacher="self", weight=0.5))
    assert after == pytest.approx(0.5 * before, rel=1e-5)


def test_a_model_in_eval_mode_learns_too():
    """Lightning leaves modes alone, and from_pretrained returns a model in eval mode; validation does not count."""
    model, teacher, x = network(0).eval(), network(1), torch.randn(8, 16)
    lifecycle, state = Lifecycle([DistillationModifier(teacher=teacher, weight=1.0)]), State(model=model)
    lifecycle.initialize(state)
    lifecycle.emit(state, Event(E.BATCH_START))
    loss = model(x).sum()
    with torch.no_grad():
        model(x + 1)
    lifecycle.emit(state.but(loss=loss), Event(E.LOSS_CALCULATED))
    assert loss.item() == pytest.approx(logit_divergence(model(x), teacher(x), 1.0, "forward").mean().item(), rel=1e-5)


def test_the_teacher_neither_moves_nor_enters_the_model():
    model = network()
    keys, modifier = list(model.state_dict()), DistillationModifier(teacher="self", weight=0.9)
    lifecycle = train(model, [modifier], 5)
    for ours, theirs in zip(modifier._teacher.module.parameters(), network().parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert not ours.requires_grad
    assert list(model.state_dict()) == keys
    lifecycle.finalize(State(model=model))
    assert not any(m._forward_hooks for m in model.modules())


def test_the_share_follows_its_schedule():
    modifier = DistillationModifier(init_weight=0.8, weight=0.2, schedule="linear", start=10, end=20)
    assert [round(modifier.share_at(i), 3) for i in (10, 15, 20)] == [0.8, 0.5, 0.2]


def test_padding_and_ignored_labels_do_not_count():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    student, teacher = (transformers.LlamaForCausalLM(config) for _ in range(2))
    ids = torch.randint(0, 50, (2, 6))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    labels = ids.clone()
    labels[1, :3] = -100
    modifier = DistillationModifier(teacher=teacher, weight=1.0)
    lifecycle, state = Lifecycle([modifier]), State(model=student)
    lifecycle.initialize(state)
    student.train()
    lifecycle.emit(state, Event(E.BATCH_START))
    loss = student(input_ids=ids, attention_mask=mask, labels=labels).loss
    lifecycle.emit(state.but(loss=loss), Event(E.LOSS_CALCULATED))
    with torch.no_grad():
        ours, theirs = (m(input_ids=ids, attention_mask=mask).logits for m in (student, teacher))
    next_label = torch.cat([labels[:, 1:], torch.full((2, 1), -100)], 1)  # a causal model predicts the next token
    counts = mask.bool() & (next_label != -100)
    assert loss.item() == pytest.approx(logit_divergence(ours[counts], theirs[counts]).mean().item(), rel=1e-5)


def test_attention_maps_are_distilled_when_the_model_gives_them():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    student, teacher = (transformers.LlamaForCausalLM(config) for _ in range(2))
    modifier = DistillationModifier(teacher=teacher, weight=1.0, divergence=None, attention_weight=1.0)
    lifecycle, state = Lifecycle([modifier]), State(model=student)
    lifecycle.initialize(state)
    student.train()
    lifecycle.emit(state, Event(E.BATCH_START))
    ids = torch.randint(0, 50, (2, 6))
    loss = student(input_ids=ids, labels=ids).loss
    lifecycle.emit(state.but(loss=loss), Event(E.LOSS_CALCULATED))
    assert loss.item() > 0
    loss.backward()
    assert student.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
    assert student.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_a_teacher_from_a_file(tmp_path, suffix):
    path = tmp_path / f"teacher{suffix}"
    weights = {f"model.{key}": value for key, value in network(4).state_dict().items()}
    if suffix == ".ckpt":
        torch.save({"state_dict": weights}, path)
    else:
        save_file(weights, path)
    modifier = DistillationModifier(teacher=str(path))
    Lifecycle([modifier]).initialize(State(model=network()))
    x = torch.randn(3, 16)
    assert torch.equal(modifier._teacher.module(x), network(4)(x))


def test_bad_teachers_and_losses_are_refused(tmp_path):
    def start(**arguments):
        Lifecycle([DistillationModifier(**arguments)]).initialize(State(model=network()))

    with pytest.raises(ValueError, match="no such file or folder"):
        start(teacher=str(tmp_path / "nothing.ckpt"))
    torch.save({"state_dict": network()}, tmp_path / "pickled.ckpt")
    with pytest.raises(ValueError, match="is damaged, or holds objects, which can run code and are not read"):
        start(teacher=str(tmp_path / "pickled.ckpt"))
    save_file({"0.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="lacks 4 tensors of the model or has other shapes"):
        start(teacher=str(tmp_path / "other.safetensors"))
    with pytest.raises(ValueError, match="the model has no module 'decoder'"):
        one_step(network(), DistillationModifier(hidden={"decoder": "0"}))
    with pytest.raises(ValueError, match=r"the teacher's logits have shape \(32, 5\), the student's \(32, 8\)"):
        one_step(network(), DistillationModifier(teacher=nn.Linear(16, 5)))
    with pytest.raises(ValueError, match="the distillation loss is nan at step 0"):
        one_step(network(), DistillationModifier(teacher=lambda x: torch.full((32, 8), float("nan"))))
    for arguments, message in [
        ({"weight": 1.5}, "weight=1.5: Input should be less than or equal to 1"),
        ({"temperature": 0}, "temperature=0: Input should be greater than 0"),
        ({"divergence": None}, "nothing to distil"),
        ({"teacher": 3}, "is neither a module nor callable"),
    ]:
        with pytest.raises(ValueError, match=message):
            start(**arguments)


def test_another_teacher_on_resume_is_refused():
    first = Lifecycle([DistillationModifier(teacher=network(1))])
    second = Lifecycle([DistillationModifier(teacher=network(2))])
    for lifecycle in (first, second):
        lifecycle.initialize(State(model=network()))
    with pytest.raises(ValueError, match="resume with the same teacher"):
        second.load_state_dict(first.state_dict())


def test_a_model_that_is_fake_quantized_already_does_not_teach_itself():
    quantize, distil = QATModifier(scheme="W4A16", group_size=16), DistillationModifier()
    with pytest.raises(ValueError, match="beside QATModifier: .* changed already: let DistillationModifier stand"):
        Lifecycle([quantize, distil]).initialize(State(model=network()))
    lifecycle = Lifecycle([DistillationModifier(), QATModifier(scheme="W4A16", group_size=16)])
    lifecycle.initialize(State(model=network()))
    assert not any(hasattr(m, "parametrizations") for m in lifecycle.modifiers[0]._teacher.module.modules())


def test_attention_maps_of_a_model_that_gives_none_are_refused_at_setup():
    with pytest.raises(ValueError, match="the forward of Sequential takes no output_attentions"):
        Lifecycle([DistillationModifier(attention_weight=1.0)]).initialize(State(model=network()))
