"""The checkpoint contract, beside what test_kill_resume.py kills: what is saved, who may load it, how often a run ends.

What cannot work is refused at set-up, and the message is tested.
"""

import random
import shutil
from contextlib import suppress

import numpy
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from pydantic import PrivateAttr
from safetensors.torch import load_file
from torch import nn

from lightning_compress import (
    CompressionCallback,
    DistillationModifier,
    FreezeModifier,
    MagnitudePruningModifier,
    QATModifier,
)
from tests.support.training_runs import RecordingModifier, Regression, Sums, quiet

INT4 = {"scheme": "W4A16", "group_size": 8}


class Cut(Callback):
    """What a power cut does."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == self.step:
            raise KeyError("power cut")


def regression(seed=0):
    torch.manual_seed(seed)
    return Regression(torch.optim.AdamW)


def keeping(folder, **options):
    return ModelCheckpoint(folder, save_last=True, every_n_train_steps=1, **options)


def cut(folder, modifiers, step=3, **options):
    """Fit until the cut; the path of the last checkpoint."""
    trainer = quiet(folder, CompressionCallback(modifiers), keeping(folder), Cut(step), max_epochs=2, **options)
    with pytest.raises(KeyError, match="power cut"):
        trainer.fit(regression(), Sums(shuffle=False))
    return folder / "last.ckpt"


def weights(module):
    return nn.utils.parameters_to_vector(module.parameters()).detach()


def zeros(module):
    return {n: (m.weight == 0).float().mean().item() for n, m in module.named_modules() if isinstance(m, nn.Linear)}


# -- what a checkpoint holds ------------------------------------------------------------------------------------------


def test_masks_scales_counts_clock_and_teacher_are_in_the_checkpoint(tmp_path):
    static = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}
    rows = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    group = {"targets": ["Linear"], "weights": rows, "input_activations": static}
    recipe = [
        DistillationModifier(weight=0.5),
        MagnitudePruningModifier(start=0, end=6),
        QATModifier(config_groups={"g": group}),
    ]
    saved = torch.load(cut(tmp_path, recipe), weights_only=True)
    kept = saved["callbacks"]["CompressionCallback"]
    assert kept["clock"] == {"steps": [3], "batches": 3}
    own = kept["modifiers"]
    assert own["MagnitudePruningModifier"]["masks"]["0"].dtype == torch.bool
    assert len(own["DistillationModifier"]["teacher"]) == 64  # a SHA-256
    scales = own["QATModifier"]["scales"]["0"]
    assert scales["scale"].shape == (8, 1)
    assert scales["input"]["batches"] == 3
    assert kept["random"][0]["torch"].dtype == torch.uint8
    assert list(saved["state_dict"]) == list(Regression().state_dict())


class Draws(RecordingModifier):
    """Draws from every stream of random numbers, before each step."""

    _drawn: list[tuple[float, float, float]] = PrivateAttr(default_factory=list)

    def on_update(self, state, event, **kwargs):
        if event.type_ == "optim_pre_step":
            self._drawn.append((torch.rand(()).item(), random.random(), float(numpy.random.rand())))


@pytest.mark.parametrize("shuffle", [False, True], ids=["in order", "shuffled"])
@pytest.mark.parametrize("step", [1, 3, 4, 6], ids=str)
def test_random_numbers_go_on_where_they_were(tmp_path, step, shuffle):
    def drawn(folder, stop=None, **fit):
        modifier = Draws(start=0)
        stopping = [] if stop is None else [Cut(stop)]
        trainer = quiet(folder, CompressionCallback(modifier), keeping(tmp_path), *stopping, max_epochs=2)
        with suppress(KeyError):
            trainer.fit(regression(), Sums(shuffle=shuffle), **fit)
        return modifier._drawn

    def seed(number):
        torch.manual_seed(number)
        random.seed(number)
        numpy.random.seed(number)

    seed(5)
    before = drawn(tmp_path / "one", stop=step)
    seed(6)
    after = drawn(tmp_path / "two", ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    (tmp_path / "last.ckpt").unlink()
    seed(5)
    assert before + after == drawn(tmp_path / "whole")
    assert len(before) == step


def test_a_shuffled_loader_goes_on_with_the_same_order_after_an_epoch(tmp_path):
    class Order(Callback):
        def __init__(self):
            self.rows = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.rows.append(batch[0][:, 0].tolist())

    def run(folder, *callbacks, **fit):
        order = Order()
        trainer = quiet(folder, order, CompressionCallback(RecordingModifier(start=0)), *callbacks, max_epochs=2)
        with suppress(KeyError):
            trainer.fit(regression(), Sums(), **fit)
        return order.rows

    whole = run(tmp_path / "whole")
    run(tmp_path / "cut", keeping(tmp_path), Cut(4))
    torch.manual_seed(99)
    assert run(tmp_path / "resumed", ckpt_path=tmp_path / "last.ckpt") == whole[4:]


# -- a run that is resumed more than once -----------------------------------------------------------------------------


def test_resuming_twice_after_the_end_of_an_epoch_trains_each_batch_once(tmp_path):
    """Lightning alone makes 10 steps of these 8: the second time it trains the epoch from its first batch."""
    hooks = []

    class Epochs(Callback):
        def on_train_epoch_start(self, trainer, *args):
            hooks.append(trainer.global_step)

    cut(tmp_path, RecordingModifier(), step=4)
    for stop in ([Cut(6)], []):
        callback = CompressionCallback(RecordingModifier())
        trainer = quiet(tmp_path, Epochs(), callback, keeping(tmp_path), *stop, max_epochs=2)
        if stop:
            with pytest.raises(KeyError, match="power cut"):
                trainer.fit(regression(), Sums(), ckpt_path="last")
        else:
            trainer.fit(regression(), Sums(), ckpt_path="last")
    assert trainer.global_step == callback.clock.global_step == callback.clock.batches == 8
    assert hooks == [4]


def test_an_interrupted_run_goes_on_in_the_same_process(tmp_path):
    """Hooks came off with the exception; an open window puts them on again."""
    callback = CompressionCallback(DistillationModifier(weight=0.5))
    module = regression()
    with pytest.raises(KeyError, match="power cut"):
        quiet(tmp_path, callback, keeping(tmp_path), Cut(4), max_epochs=2).fit(module, Sums(shuffle=False))
    quiet(tmp_path, callback, keeping(tmp_path), max_epochs=2).fit(module, Sums(shuffle=False), ckpt_path="last")
    assert callback.done
    again = regression()
    other = CompressionCallback(DistillationModifier(weight=0.5))
    quiet(tmp_path / "whole", other, max_epochs=2).fit(again, Sums(shuffle=False))
    assert torch.equal(weights(module), weights(again))


# -- the end, once ----------------------------------------------------------------------------------------------------


def test_a_finished_run_that_is_resumed_exports_once(tmp_path):
    """``last.ckpt`` is that of the training's end, dense; what was made of it is there already."""
    first = regression()
    quiet(tmp_path, CompressionCallback(QATModifier(**INT4)), keeping(tmp_path / "kept"), max_epochs=2).fit(
        first, Sums(shuffle=False)
    )
    exported = tmp_path / "compressed" / "model.safetensors"
    before = (exported.stat().st_ino, exported.stat().st_mtime_ns, (tmp_path / "compressed.ckpt").stat().st_mtime_ns)
    again, callback = regression(9), CompressionCallback(QATModifier(**INT4))
    trainer = quiet(tmp_path, callback, keeping(tmp_path / "kept"), max_epochs=2)
    trainer.fit(again, Sums(shuffle=False), ckpt_path="last")
    assert callback.done
    now = (exported.stat().st_ino, exported.stat().st_mtime_ns, (tmp_path / "compressed.ckpt").stat().st_mtime_ns)
    assert now == before
    assert trainer.checkpoint_callback.best_model_path == str(tmp_path / "compressed.ckpt")
    x = Sums().rows.tensors[0]
    assert torch.equal(again(x), first(x))  # the compressed model, not the dense one


@pytest.mark.parametrize("gone", ["compressed", "compressed.ckpt"])
def test_a_finished_run_whose_export_is_gone_exports_again(tmp_path, gone):
    fits = []
    for _ in range(2):
        callback = CompressionCallback(QATModifier(**INT4))
        trainer = quiet(tmp_path, callback, keeping(tmp_path / "kept"), max_epochs=2)
        trainer.fit(regression(), Sums(shuffle=False), ckpt_path="last")
        fits.append((tmp_path / "compressed" / "model.safetensors").read_bytes())
        shutil.rmtree(tmp_path / gone) if gone == "compressed" else (tmp_path / gone).write_bytes(b"torn")
    assert fits[0] == fits[1]


def test_a_finished_run_that_trains_on_exports_what_it_has_become(tmp_path):
    exports = []
    for epochs in (1, 2):
        callback = CompressionCallback(QATModifier(**INT4))
        trainer = quiet(tmp_path, callback, keeping(tmp_path / "kept"), max_epochs=epochs)
        trainer.fit(regression(), Sums(shuffle=False), ckpt_path="last")
        exports.append((tmp_path / "compressed" / "model.safetensors").read_bytes())
    assert exports[0] != exports[1]
    assert callback.clock.global_step == 8


def test_the_last_checkpoint_of_training_is_not_the_compressed_one(tmp_path):
    """ModelCheckpoint saves once more at the end when it has not saved yet, and comes after us."""
    saving = ModelCheckpoint(tmp_path / "kept", save_last=True, every_n_epochs=7)
    quiet(tmp_path, CompressionCallback(QATModifier(**INT4)), saving).fit(regression(), Sums())
    saved = torch.load(tmp_path / "kept" / "last.ckpt", weights_only=True)
    assert saved["callbacks"]["CompressionCallback"]["done"] is False


# -- weights of another moment ----------------------------------------------------------------------------------------


PRUNING = {
    "magnitude": lambda: MagnitudePruningModifier(start=0, end=6),
    "2:4": lambda: MagnitudePruningModifier(start=5, mask_structure="2:4"),
    "global": lambda: MagnitudePruningModifier(start=0, end=6, scope="global"),
}


@pytest.mark.parametrize("prune", PRUNING.values(), ids=PRUNING)
def test_averaged_weights_are_as_sparse_as_the_others(tmp_path, prune):
    """An average over time holds weights from before they were pruned."""
    module = regression()
    averaging = EMAWeightAveraging(decay=0.5)
    quiet(tmp_path, averaging, CompressionCallback(prune()), max_epochs=2).fit(module, Sums(shuffle=False))
    other = regression()
    quiet(tmp_path / "plain", CompressionCallback(prune()), max_epochs=2).fit(other, Sums(shuffle=False))
    assert zeros(module) == zeros(other)
    assert not torch.equal(weights(module), weights(other))
    saved = torch.load(tmp_path / "compressed.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(saved["model.0.weight"], module.model[0].weight)


@pytest.mark.parametrize("freeze", [True, False], ids=["freeze", "distill"])
def test_averaging_goes_with_freezing_and_distilling(tmp_path, freeze):
    modifier = FreezeModifier(targets=["0"]) if freeze else DistillationModifier(weight=0.5)
    module = regression()
    before = module.model[0].weight.detach().clone()
    quiet(tmp_path, EMAWeightAveraging(decay=0.5), CompressionCallback(modifier), max_epochs=2).fit(module, Sums())
    assert torch.equal(module.model[0].weight, before) == freeze


def test_the_average_is_what_a_killed_run_ends_with(tmp_path):
    """Killed while compressing: on_train_end, where averaging puts its average into the model, never comes again."""

    class Fails(CompressionCallback):
        @property
        def state_key(self):
            return "CompressionCallback"

        def _finish(self, *args, **kwargs):
            raise KeyError("power cut")

    def fit(folder, callback, **fit):
        module = regression()
        saving = ModelCheckpoint(folder, save_last=True)
        averaging = EMAWeightAveraging(decay=0.5)
        quiet(folder, averaging, callback, saving, max_epochs=2).fit(module, Sums(shuffle=False), **fit)
        return module

    whole = fit(tmp_path / "whole", CompressionCallback(PRUNING["magnitude"]()))
    with pytest.raises(KeyError, match="power cut"):
        fit(tmp_path / "killed", Fails(PRUNING["magnitude"]()))
    resumed = fit(tmp_path / "killed", CompressionCallback(PRUNING["magnitude"]()), ckpt_path="last")
    assert torch.equal(weights(whole), weights(resumed))


def test_weights_alone_can_be_the_best_of_a_pruned_run(tmp_path):
    best = ModelCheckpoint(tmp_path / "kept", monitor="val/mse", save_weights_only=True)
    module = regression()
    quiet(tmp_path, CompressionCallback(PRUNING["magnitude"]()), best, max_epochs=2).fit(module, Sums())
    assert set(zeros(module).values()) == {0.5}


def test_weights_alone_do_not_go_with_learned_scales(tmp_path):
    best = ModelCheckpoint(tmp_path / "kept", monitor="val/mse", save_weights_only=True)
    with pytest.raises(ValueError, match="save_weights_only=True.*QATModifier.*load_best=False"):
        quiet(tmp_path, CompressionCallback(QATModifier(**INT4)), best, max_epochs=2).fit(regression(), Sums())
    callback = CompressionCallback(QATModifier(**INT4), load_best=False)
    quiet(tmp_path, callback, best, max_epochs=2).fit(regression(), Sums())
    assert callback.done


def test_weights_alone_cannot_be_resumed(tmp_path):
    saving = ModelCheckpoint(tmp_path / "kept", save_weights_only=True)
    quiet(tmp_path, CompressionCallback(FreezeModifier(targets=["0"])), saving).fit(regression(), Sums())
    path = saving.best_model_path if "kept" in saving.best_model_path else next((tmp_path / "kept").glob("*.ckpt"))
    callback = CompressionCallback(FreezeModifier(targets=["0"]))
    with pytest.raises(KeyError, match="contains only the model"):
        quiet(tmp_path / "resumed", callback, max_epochs=2).fit(regression(), Sums(), ckpt_path=path)


@pytest.mark.parametrize("kind", ["magnitude", "2:4", "qat"])
def test_checkpoints_of_training_load_into_the_plain_module(tmp_path, kind):
    modifier = QATModifier(**INT4) if kind == "qat" else PRUNING[kind]()
    trainer, module = quiet(tmp_path, CompressionCallback(modifier), keeping(tmp_path), max_epochs=2), regression()
    trainer.fit(module, Sums())
    trained = Regression.load_from_checkpoint(tmp_path / "last.ckpt")
    compressed = Regression.load_from_checkpoint(tmp_path / "compressed.ckpt")
    assert torch.equal(weights(compressed.cpu()), weights(module))
    assert (zeros(trained) == zeros(module)) == (kind != "qat")
    said = trainer.test(module, Sums(), ckpt_path="best", verbose=False)
    assert said == quiet(tmp_path).test(compressed, Sums(), verbose=False)


# -- a recipe that changed --------------------------------------------------------------------------------------------


def stack(*names):
    made = {
        "distill": lambda: DistillationModifier(weight=0.5),
        "magnitude": lambda: MagnitudePruningModifier(start=0, end=6),
        "qat": lambda: QATModifier(**INT4, gradient="ste"),
    }
    return [made[name]() for name in names]


CHANGES = {
    "added": (
        ["distill", "qat"],
        ["distill", "magnitude", "qat"],
        "modifiers.MagnitudePruningModifier.type: 'absent' -> 'MagnitudePruningModifier'",
    ),
    "removed": (["distill", "qat"], ["qat"], "modifiers.DistillationModifier.type: 'DistillationModifier' -> 'absent'"),
    "in another order": (
        ["distill", "magnitude"],
        ["magnitude", "distill"],
        "order of modifiers: DistillationModifier, MagnitudePruningModifier -> "
        "MagnitudePruningModifier, DistillationModifier",
    ),
}


@pytest.mark.parametrize(("then", "now", "said"), CHANGES.values(), ids=CHANGES)
def test_a_changed_stack_is_shown_and_can_be_allowed(tmp_path, then, now, said):
    path = cut(tmp_path, stack(*then))
    with pytest.raises(ValueError, match="the recipe differs") as caught:
        quiet(tmp_path, CompressionCallback(stack(*now)), max_epochs=2).fit(regression(), Sums(), ckpt_path=path)
    assert said in str(caught.value)
    assert "allow_recipe_change=True" in str(caught.value)
    callback = CompressionCallback(stack(*now), allow_recipe_change=True)
    quiet(tmp_path, callback, max_epochs=2).fit(regression(), Sums(), ckpt_path=path)
    assert callback.done
    assert callback.clock.global_step == 8


# -- compiled models --------------------------------------------------------------------------------------------------

LATE = {
    "pruning": lambda: [MagnitudePruningModifier(start=2, end=6)],
    "distillation that begins and ends": lambda: [DistillationModifier(weight=0.5, start=2, end=6)],
    "stack": lambda: [
        DistillationModifier(weight=0.5, start=1),
        MagnitudePruningModifier(start=2, end=6),
        QATModifier(**INT4, start=3),
    ],
}


@pytest.mark.parametrize("whole", [False, True], ids=["inside", "whole"])
@pytest.mark.parametrize("recipe", LATE.values(), ids=LATE)
def test_a_compiled_model_is_compressed_as_the_same_one_uncompiled(tmp_path, recipe, whole):
    """Windows open after the first step, when the code is compiled already."""
    ends = []
    for compiled in (False, True):
        torch.compiler.reset()
        module = regression()
        if compiled and not whole:
            module.model = torch.compile(module.model, backend="eager")
        root = torch.compile(module, backend="eager") if compiled and whole else module
        folder = tmp_path / str(compiled)
        quiet(folder, CompressionCallback(recipe()), max_epochs=2).fit(root, Sums(shuffle=False))
        ends.append((weights(module), load_file(folder / "compressed" / "model.safetensors")))
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1].keys() == ends[1][1].keys()
    assert all(torch.equal(tensor, ends[1][1][name]) for name, tensor in ends[0][1].items())
