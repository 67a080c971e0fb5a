"""Distillation of models that are no language models, teachers that are copied in mid-run, and what does not fit."""

import copy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_compress.core import Event, EventType, Lifecycle, State
from lightning_compress.modifiers.distillation.divergence import logit_divergence
from lightning_compress.modifiers.distillation.modifier import DistillationModifier
from lightning_compress.modifiers.magnitude import MagnitudePruningModifier
from lightning_compress.modifiers.qat import QATModifier
from tests.support.training_loop import network, train

E = EventType
IMAGES = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def convolutions(width, seed=0, stride=2):
    torch.manual_seed(seed)
    first = nn.Conv2d(1, width, 3, stride=stride, padding=1)
    return nn.Sequential(first, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))


def distilled(model, modifier, inputs=IMAGES, batch=None):
    """The loss that a single step gives with a task loss of 0."""
    lifecycle, state = Lifecycle([modifier]), State(model=model, batch_data=batch)
    lifecycle.initialize(state)
    lifecycle.emit(state, Event(E.BATCH_START))
    output = model(inputs)
    loss = (output if isinstance(output, torch.Tensor) else output["logits"]).sum() * 0
    lifecycle.emit(state.but(loss=loss), Event(E.LOSS_CALCULATED))
    return loss, lifecycle


def test_a_narrower_network_learns_the_features_of_a_wider_one():
    student, teacher = convolutions(3), convolutions(5, 1)
    options = {"hidden": {"0": "0"}, "hidden_weight": 0.5, "weight": 1.0}
    loss, lifecycle = distilled(student, DistillationModifier(teacher=teacher, **options))
    weight = lifecycle.modifiers[0]._hidden.projections.weights["0"]
    ours, theirs = student[0](IMAGES).movedim(1, -1) @ weight.T, teacher[0](IMAGES).movedim(1, -1)
    distance = ((ours - theirs).square().sum(-1) / theirs.square().sum(-1)).mean()
    expected = logit_divergence(student(IMAGES), teacher(IMAGES)).mean() + 0.5 * distance
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert student[0].weight.grad.abs().sum() > 0
    assert list(student.state_dict()) == list(convolutions(3).state_dict())


def test_a_dict_of_outputs_and_a_mask_of_the_batch():
    class Tagger(nn.Linear):
        def forward(self, x):
            return {"logits": super().forward(x), "other": x}

    torch.manual_seed(0)
    student, teacher, x = Tagger(4, 3), Tagger(4, 3), torch.randn(2, 5, 4)
    mask = torch.tensor([[1, 1, 0, 0, 1], [0, 1, 1, 1, 0]])
    loss, _ = distilled(student, DistillationModifier(teacher=teacher, weight=1.0, mask_key="keep"), x, {"keep": mask})
    per_token = logit_divergence(student(x)["logits"], teacher(x)["logits"])
    assert loss.item() == pytest.approx(per_token[mask.bool()].mean().item(), rel=1e-5)


def test_a_callable_teaches_logits():
    student = convolutions(3)
    loss, _ = distilled(student, DistillationModifier(teacher=lambda x: torch.zeros(len(x), 4), weight=1.0))
    assert loss.item() == pytest.approx(logit_divergence(student(IMAGES), torch.zeros(6, 4)).mean().item(), rel=1e-5)


# -- a copy in mid-run -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("others", [[], ["qat"], ["prune", "qat"]], ids=str)
def test_with_a_later_start_the_teacher_is_the_model_of_then_and_survives_a_resume(others):
    def recipe():
        later = {"qat": QATModifier(scheme="W4A16", group_size=16), "prune": MagnitudePruningModifier(start=4, end=6)}
        return [DistillationModifier(teacher="self", start=3), *(later[name] for name in others)]

    seen, model = {}, network()
    lifecycle = Lifecycle(recipe())
    lifecycle.initialize(State(model=model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def note(step):
        seen[step] = copy.deepcopy(dict(model.state_dict()))

    train(model, [], 5, lifecycle=lifecycle, optimizer=optimizer, after_step=note)
    teacher = lifecycle.modifiers[0]._teacher.module
    assert all(torch.equal(tensor, seen[3][name]) for name, tensor in teacher.state_dict().items())
    assert not any(hasattr(m, "parametrizations") for m in teacher.modules())

    again = network(9)  # another process builds other weights
    second = Lifecycle(recipe())
    second.initialize(State(model=again))
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    second.load_state_dict(copy.deepcopy(lifecycle.state_dict()))
    saved = second.modifiers[0].state_dict()["teacher_weights"]  # a checkpoint before the first batch holds it too
    assert torch.equal(saved["0.weight"], seen[3]["0.weight"])
    resumed = torch.optim.SGD(again.parameters(), lr=0.1)
    train(again, [], 7, first=5, lifecycle=second, optimizer=resumed)
    train(model, [], 7, first=5, lifecycle=lifecycle, optimizer=optimizer)
    assert second.modifiers[0]._teacher.hash == lifecycle.modifiers[0]._teacher.hash
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_a_teacher_from_set_up_is_not_in_the_checkpoint():
    lifecycle = train(network(), [DistillationModifier(teacher="self")], 2)
    assert lifecycle.state_dict()["DistillationModifier"]["teacher_weights"] == {}


# -- what does not fit -----------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_at_set_up_where_that_is_possible():
    def start(model=None, **options):
        Lifecycle([DistillationModifier(**options)]).initialize(State(model=model or network()))

    def with_vocabulary(size):
        model = network()
        model.config = SimpleNamespace(vocab_size=size)
        return model

    with pytest.raises(ValueError, match="the teacher's vocabulary has 60 tokens, the model's 50: expected one"):
        start(with_vocabulary(50), teacher=with_vocabulary(60))
    start(with_vocabulary(50), teacher=with_vocabulary(60), divergence=None, hidden={"0": "0"})
    with pytest.raises(ValueError, match=r"hidden \(teacher\): the model has no module '7'; expected a dotted name"):
        start(hidden={"0": "7"})
    with pytest.raises(ValueError, match="hidden states need a teacher that is a module"):
        start(teacher=F.relu, hidden={"0": "0"})
    for options, message in [
        ({"init_weight": 0.5, "end": 5}, "init_weight=0.5 with schedule='constant': a share that changes needs both"),
        ({"schedule": "linear", "end": 5}, "init_weight=None with schedule='linear': a share that changes needs both"),
        ({"init_weight": 0.5, "schedule": "linear"}, "init_weight needs end"),
        (
            {"init_weight": -0.5, "schedule": "linear", "end": 5},
            "init_weight=-0.5: Input should be greater than or equal to 0",
        ),
        ({"update": 5}, "update=5.0: distillation acts on every batch of its window"),
        ({"beta": 1.0}, "beta=1.0"),
        ({"hidden": {"0": "0"}, "hidden_weight": -1}, "hidden_weight=-1"),
        ({"projection_lr": 0}, "projection_lr=0"),
        ({"teacher_dtype": "int8"}, "teacher_dtype='int8'"),
        ({"end": 0}, "end=0.0 must lie after start=0.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            start(**options)


def test_what_does_not_fit_is_refused_in_the_first_batch():
    with pytest.raises(ValueError, match=r"hidden '0': student \(6, 4, 4, 3\), teacher \(6, 8, 8, 3\), features last"):
        distilled(convolutions(3), DistillationModifier(teacher=convolutions(3, stride=1), hidden={"0": "0"}))
    with pytest.raises(ValueError, match=r"the teacher's logits have shape \(6, 9\), the student's \(6, 4\)"):
        distilled(convolutions(3), DistillationModifier(teacher=nn.Sequential(nn.Flatten(), nn.Linear(64, 9)), top_k=2))
    with pytest.raises(ValueError, match="the teacher cannot be called with the model's inputs"):
        distilled(convolutions(3), DistillationModifier(teacher=nn.Linear(3, 4)))
    Attentive = type("Attentive", (nn.Linear,), {"forward": lambda self, x, **more: nn.Linear.forward(self, x)})
    with pytest.raises(ValueError, match="attention_weight > 0, but the model gives no attention maps"):
        distilled(Attentive(8, 4), DistillationModifier(divergence=None, attention_weight=1.0), IMAGES[:, 0])

    class Lazy(nn.Linear):
        def __init__(self):
            super().__init__(8, 4)
            self.unused = nn.Linear(2, 2)

    with pytest.raises(ValueError, match="hidden: 'unused' or its counterpart 'unused' was not called in this forward"):
        distilled(Lazy(), DistillationModifier(hidden={"unused": "unused"}), IMAGES[:, 0])


def test_a_step_without_a_forward_of_the_model_is_an_error():
    model = network()
    lifecycle, state = Lifecycle([DistillationModifier()]), State(model=model)
    lifecycle.initialize(state)
    lifecycle.emit(state, Event(E.BATCH_START))
    with pytest.raises(ValueError, match="forward was not called in this training step; .* module= in"):
        lifecycle.emit(state.but(loss=model[0](torch.randn(2, 16)).sum()), Event(E.LOSS_CALCULATED))


# -- two processes ---------------------------------------------------------------------------------------------------

RANKS = """
import sys, torch
from pathlib import Path
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from lightning_compress import CompressionCallback, DistillationModifier
from tests.support.training_runs import Regression, Sums, quiet

folder = Path(sys.argv[1])
torch.manual_seed(1)
teacher = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 1))
torch.manual_seed(0)
model = Regression()
stages = [
    DistillationModifier(teacher=teacher, divergence=None, hidden={"0": "0"}, group="hidden"),
    DistillationModifier(teacher=teacher, cache_dir=str(folder / "cache"), group="logits", end=6),
]
callback = CompressionCallback(stages, evaluate=False)
trainer = quiet(folder, callback, strategy=DDPStrategy(process_group_backend="gloo"), devices=2, max_epochs=3)
trainer.fit(model, Sums(batches=8))
flags = [flag for row in callback.ledger for flag in row.flags]
said = {"weight": stages[0]._hidden.projections.weights["0"].detach(), "model": model.state_dict(), "flags": flags}
torch.save(said, folder / f"rank{trainer.global_rank}.pt")
"""


def test_two_ranks_share_projections_and_the_cache(tmp_path):
    (tmp_path / "run.py").write_text(RANKS)
    root = Path(__file__).parents[3]
    environment = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    run = [sys.executable, str(tmp_path / "run.py"), str(tmp_path)]
    done = subprocess.run(run, cwd=root, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in range(2))
    assert torch.equal(first["weight"], second["weight"])
    assert all(torch.equal(first["model"][name], second["model"][name]) for name in first["model"])
    (told,) = first["flags"]
    # 32 samples in 4 steps an epoch, all ranks; the window holds one epoch and half of the second
    assert told.startswith("teacher cache: 16 hits, 32 misses, 32 samples in ")
