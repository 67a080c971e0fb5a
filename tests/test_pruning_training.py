"""Pruning in a real Trainer.fit: export, best checkpoints, averaging, precision, two ranks, windows that do not fit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_compress import (
    CompressionCallback,
    ConstantPruningModifier,
    DistillationModifier,
    LearnedMaskModifier,
    MagnitudePruningModifier,
    MovementPruningModifier,
    QATModifier,
    load,
)
from tests.support.training_runs import Regression, Sums, quiet

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
FIRST = {"targets": ["0"]}  # 8 x 8 weights; the other layer is 1 x 8


def pruning(kind: str, **options):
    """A modifier whose window is the first of two epochs of four steps."""
    window = {"start": 0, "end": 4} | options
    match kind:
        case "magnitude":
            return MagnitudePruningModifier(**FIRST, **window)
        case "movement":
            return MovementPruningModifier(**FIRST, **window)
        case "movement 2:4":
            return MovementPruningModifier(**FIRST, **window, mask_structure="2:4")
        case "learned":
            return LearnedMaskModifier(**FIRST, **window)
    raise ValueError(kind)


KINDS = ["magnitude", "movement", "movement 2:4", "learned"]


def module(seed: int = 0, kind: type[Regression] = Regression) -> Regression:
    torch.manual_seed(seed)
    return kind(torch.optim.Adam)


class Worse(Regression):
    """The first epoch is the best."""

    def validation_step(self, batch, batch_idx):
        self.log("val/mse", float(self.trainer.current_epoch))


def zeros(model: LightningModule) -> float:
    return (model.model[0].weight == 0).float().mean().item()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_exported_is_sparse_and_has_dense_keys(tmp_path, kind):
    model = module()
    keys = list(model.state_dict())
    keeping = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
    quiet(tmp_path, CompressionCallback(pruning(kind)), keeping, max_epochs=2).fit(model, Sums())
    assert zeros(model) == 0.5
    for name in ("last", "compressed"):
        assert list(torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["state_dict"]) == keys
    loaded = load(tmp_path / "compressed", nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)))
    assert torch.equal(loaded[0].weight, model.model[0].weight)
    assert type(model.model[0]) is nn.Linear


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("magnitude", r"saved at a sparsity of 0\.\d+, before the schedule had reached 0.500: its smallest weights"),
        ("movement", r"saved at a sparsity of 0\.\d+, before the schedule had reached 0.500: it gets the masks of"),
        ("learned", "saved before start=5.0 .unit: step.: its dense weights get the masks of the last step"),
    ],
)
def test_a_best_checkpoint_that_is_less_sparse_is_not_exported_in_silence(tmp_path, kind, told):
    window = {"start": 5, "end": 8} if kind == "learned" else {"end": 7}
    model = module(kind=Worse)
    keeping = ModelCheckpoint(tmp_path / "kept", monitor="val/mse")
    with pytest.warns(UserWarning, match=told):
        quiet(tmp_path, CompressionCallback(pruning(kind, **window)), keeping, max_epochs=2).fit(model, Sums())
    assert zeros(model) == 0.5
    best = torch.load(next((tmp_path / "kept").glob("*.ckpt")), weights_only=True)["state_dict"]["model.0.weight"]
    kept = model.model[0].weight != 0
    agree = torch.isclose(model.model[0].weight[kept], best[kept]).float().mean()
    assert agree == 1.0 or kind == "movement"  # some of those were asleep, and woke


def test_held_zeros_are_in_a_best_checkpoint_from_before_them_too(tmp_path):
    class Zeroing(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                with torch.no_grad():
                    pl_module.model[0].weight[:, ::2] = 0

    model = module(kind=Worse)
    keeping = ModelCheckpoint(tmp_path / "kept", monitor="val/mse")
    callback = CompressionCallback(ConstantPruningModifier(**FIRST, start=4))
    with pytest.warns(UserWarning, match="saved before start=4.0 .unit: step., when 0.000 .* makes it 0.500 now"):
        quiet(tmp_path, Zeroing(), callback, keeping, max_epochs=2).fit(model, Sums())
    assert (model.model[0].weight[:, ::2] == 0).all()


def test_a_best_checkpoint_from_inside_the_window_with_as_many_zeros_comes_with_its_masks(tmp_path, recwarn):
    model = module(kind=Worse)
    keeping = ModelCheckpoint(tmp_path / "kept", monitor="val/mse")
    callback = CompressionCallback(pruning("movement 2:4", end=7))
    quiet(tmp_path, callback, keeping, max_epochs=2).fit(model, Sums())
    best = torch.load(next((tmp_path / "kept").glob("*.ckpt")), weights_only=True)["state_dict"]["model.0.weight"]
    assert torch.equal(model.model[0].weight, best)
    assert not [w for w in recwarn if "MovementPruning" in str(w.message)]


@pytest.mark.parametrize("kind", ["movement", "learned"])
def test_a_best_checkpoint_from_after_the_window_is_exported_as_it_is(tmp_path, kind, recwarn):
    model = module(kind=Worse)
    keeping = ModelCheckpoint(tmp_path / "kept", monitor="val/mse")
    quiet(tmp_path, CompressionCallback(pruning(kind, end=3)), keeping, max_epochs=2).fit(model, Sums())
    best = torch.load(next((tmp_path / "kept").glob("*.ckpt")), weights_only=True)["state_dict"]["model.0.weight"]
    assert torch.equal(model.model[0].weight, best)
    assert not [w for w in recwarn if "best checkpoint" in str(w.message)]


class Cut(Callback):
    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == 3:
            pl_module.eval()
            with torch.no_grad():
                self.outputs = pl_module(X)
            pl_module.train()
        if trainer.global_step == 5:
            raise KeyError("power cut")


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_cut_short_is_tested_as_it_was_saved(tmp_path, kind):
    model, cut = module(), Cut()
    keeping = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    trainer = quiet(tmp_path, CompressionCallback(pruning(kind, end=6)), cut, keeping, max_epochs=2)
    with pytest.raises(KeyError, match="power cut"):
        trainer.fit(model, Sums())
    trainer.test(model, Sums(), ckpt_path=tmp_path / "step=3.ckpt", verbose=False)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(X), cut.outputs)


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 2},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"gradient_clip_val": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_other_ways_to_train(tmp_path, kind, options):
    model = module()
    callback = CompressionCallback(pruning(kind), evaluate=False)
    quiet(tmp_path, callback, max_epochs=3, **options).fit(model, Sums())
    assert zeros(model) == 0.5


@pytest.mark.parametrize("kind", ["magnitude", "movement"])
def test_an_average_of_weights_is_sparse_too(tmp_path, kind):
    """The average remembers what was there before it was pruned."""
    model = module()
    quiet(tmp_path, EMAWeightAveraging(), CompressionCallback(pruning(kind)), max_epochs=2).fit(model, Sums())
    assert zeros(model) == 0.5


def test_averaging_beside_learned_masks_is_refused(tmp_path):
    with pytest.raises(ValueError, match="pairs tensors by position"):
        quiet(tmp_path, EMAWeightAveraging(), CompressionCallback(pruning("learned"))).fit(module(), Sums())


@pytest.mark.parametrize("kind", ["movement", "learned"])
def test_a_compiled_model(tmp_path, kind):
    model = module()
    model.model = torch.compile(model.model, backend="eager")
    quiet(tmp_path, CompressionCallback(pruning(kind), evaluate=False), max_epochs=2).fit(model, Sums())
    loaded = load(tmp_path / "compressed", nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)))
    assert (loaded[0].weight == 0).float().mean() == 0.5


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "cubic", "polynomial"])
def test_a_schedule_is_the_same_in_steps_epochs_and_fractions(tmp_path, schedule):
    paths = []
    for unit, scale in (("step", 1), ("epoch", 4), ("fraction", 8)):

        class Look(Callback):
            def __init__(self):
                self.seen = []

            def on_train_batch_end(self, trainer, pl_module, *args):
                self.seen.append(zeros(pl_module))

        look, model = Look(), module()
        modifier = MagnitudePruningModifier(
            **FIRST, start=1 / scale, end=6 / scale, update=2 / scale, unit=unit, schedule=schedule, init_sparsity=0.125
        )
        quiet(tmp_path / unit, CompressionCallback(modifier, evaluate=False), look, max_epochs=2).fit(model, Sums())
        paths.append(look.seen)
    assert paths[0] == paths[1] == paths[2]
    assert paths[0][0] == 0
    assert paths[0][-1] == 0.5
    assert (paths[0][1] == 0.5) == (schedule == "constant")


def test_a_stack_of_distillation_movement_and_quantization(tmp_path):
    recipe = [
        DistillationModifier(weight=0.5),
        pruning("movement"),
        QATModifier(scheme="W8A16", group_size=8, targets=["Linear"]),
    ]
    model = module()
    quiet(tmp_path, CompressionCallback(recipe), max_epochs=2).fit(model, Sums())
    loaded = load(tmp_path / "compressed", nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)))
    assert torch.equal(loaded[0].weight, model.model[0].weight)
    assert zeros(model) >= 0.5


# -- windows that do not fit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"end": 10}, "end=10 lies past the end of the run, which covers 80% of the window: the run has 8 steps"),
        ({"end": 4, "unit": "epoch"}, "end=4 lies past .* covers 50% of .* has 8 steps, 2 in unit 'epoch'"),
        ({"start": 8, "end": 9}, "start=8 is not before the end of the run, so it will never start: .* 8 steps"),
    ],
    ids=str,
)
def test_a_window_past_the_end_of_the_run_is_a_warning_with_the_numbers(tmp_path, options, told):
    with pytest.warns(UserWarning, match=f"MagnitudePruningModifier: {told}"):
        quiet(tmp_path, CompressionCallback(pruning("magnitude", **options)), max_epochs=2).fit(module(), Sums())


def test_a_window_that_fits_is_none(tmp_path, recwarn):
    quiet(tmp_path, CompressionCallback(pruning("magnitude", end=8)), max_epochs=2).fit(module(), Sums())
    assert not [w for w in recwarn if "the end of the run" in str(w.message)]


@pytest.mark.parametrize("kind", ["magnitude", "movement"])
def test_a_run_that_stops_before_the_schedule_says_how_sparse_it_is(tmp_path, kind):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = trainer.global_step == 4

    model = module()
    callback = CompressionCallback(pruning(kind, end=7), evaluate=False)
    with pytest.warns(UserWarning, match=r"the run ended before end=7.0, .* reached a sparsity of 0\.4\d+"):
        quiet(tmp_path, callback, Stop(), max_epochs=2).fit(model, Sums())
    assert 0.4 < zeros(model) < 0.5


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            x = torch.randn(8)
            yield x, x.sum(0, keepdim=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("unit", "limits", "needed"),
    [("epoch", {"max_steps": 9}, "steps_per_epoch"), ("fraction", {"max_time": "00:00:00:05"}, "total_steps")],
)
def test_a_schedule_in_epochs_or_fractions_needs_a_loader_that_ends(tmp_path, kind, unit, limits, needed):
    limits = {"max_epochs": -1} | limits
    trainer = quiet(tmp_path, CompressionCallback(pruning(kind, end=0.5, unit=unit)), **limits)
    with pytest.raises(ValueError, match=f"unit='{unit}' needs a known {needed}.*an endless loader.*use unit='step'"):
        trainer.fit(module(), DataLoader(Endless(), 4))


def test_an_endless_loader_with_a_number_of_steps_has_fractions(tmp_path):
    model = module()
    callback = CompressionCallback(pruning("magnitude", end=0.5, unit="fraction"), evaluate=False)
    quiet(tmp_path, callback, max_steps=8, max_epochs=-1).fit(model, DataLoader(Endless(), 4))
    assert zeros(model) == 0.5


# -- two ranks --------------------------------------------------------------------------------------------------------

RANKS = """
import sys, torch
from pathlib import Path
from lightning.pytorch.strategies import DDPStrategy
from lightning_compress import CompressionCallback
from tests.test_pruning_training import module, pruning
from tests.support.training_runs import Sums, quiet

made = {}
for kind in ("magnitude", "movement", "learned"):
    folder, model, modifier = Path(sys.argv[1]) / kind, module(), pruning(kind)
    trainer = quiet(folder, CompressionCallback(modifier), max_epochs=2, devices=2,
                    strategy=DDPStrategy(process_group_backend="gloo"))
    trainer.fit(model, Sums(batches=8))
    made[kind] = (modifier._weights.masks["0"], model.model[0].weight.data)
torch.save(made, Path(sys.argv[1]) / f"rank{trainer.global_rank}.pt")
"""


def test_two_ranks_end_with_equal_masks(tmp_path):
    (tmp_path / "run.py").write_text(RANKS)
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    run = [sys.executable, str(tmp_path / "run.py"), str(tmp_path)]
    done = subprocess.run(run, cwd=root, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert list(first) == ["magnitude", "movement", "learned"]
    for kind, (mask, weight) in first.items():
        assert torch.equal(mask, second[kind][0])
        assert torch.equal(weight, second[kind][1])
        assert mask.float().mean() == 0.5
        assert (weight[~mask] == 0).all()
