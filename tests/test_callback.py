"""The events of real runs: which, in which order, and what the clock says."""

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.plugins.precision import MixedPrecision
from pydantic import PrivateAttr

import lightning_compress
from lightning_compress import CompressionCallback, GPTQModifier, Modifier
from lightning_compress.core import State
from tests.support.training_runs import RecordingModifier, Regression, Sums, quiet

STEP, ACCUMULATE = "SLpPE", "SLE"


def recorded(folder, module=None, datamodule=None, modifier=None, **options):
    """Fit, and return the modifier and the callback."""
    modifier = modifier or RecordingModifier(start=0)
    callback = CompressionCallback(modifier, evaluate=False)
    quiet(folder, callback, **options).fit(module or Regression(), datamodule or Sums())
    return modifier, callback


def test_every_batch_has_its_events_in_order(tmp_path):
    modifier, callback = recorded(tmp_path, max_epochs=2)
    assert modifier.batches == [STEP] * 8
    assert [s for n, s, _ in modifier._events if n == "OPTIM_PRE_STEP"] == list(range(8))
    assert [s for n, s, _ in modifier._events if n == "OPTIM_POST_STEP"] == list(range(1, 9))
    assert [b for n, _, b in modifier._events if n == "BATCH_START"] == list(range(8))
    assert modifier._calls == ["initialize", "start at 0", "finalize"]
    assert callback.done


def test_accumulation_steps_in_the_last_partial_window(tmp_path):
    modifier, callback = recorded(tmp_path, datamodule=Sums(batches=5), accumulate_grad_batches=2, max_epochs=2)
    assert modifier.batches == [ACCUMULATE, STEP, ACCUMULATE, STEP, STEP] * 2
    assert callback.clock.steps_per_epoch == 3
    assert callback.clock.total_steps == 6 == callback.clock.global_step
    assert callback.clock.batches == 10


def test_validation_inside_the_epoch_sends_nothing(tmp_path):
    modifier, _ = recorded(tmp_path, val_check_interval=1)
    assert modifier.batches == [STEP] * 4


def test_bf16_autocast(tmp_path):
    modifier, _ = recorded(tmp_path, precision="bf16-mixed", limit_train_batches=2)
    assert modifier.batches == [STEP] * 2


class Gan(Regression):
    """Two optimizers, stepped by hand; the second one ``second`` times a batch."""

    second = 1

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), lr=0.01), torch.optim.Adam(self.parameters(), lr=0.01)]

    def training_step(self, batch, batch_idx):
        for optimizer, times in zip(self.optimizers(), (1, self.second), strict=True):
            for _ in range(times):
                optimizer.zero_grad()
                self.manual_backward(self.error(batch))
                optimizer.step()


def test_two_optimizers_by_hand_count_one_step_each(tmp_path):
    modifier, callback = recorded(tmp_path, Gan())
    assert modifier.batches == ["SLpPLpPE"] * 4
    assert callback.clock.steps == [4, 4]
    assert callback.clock.global_step == 4  # Lightning's own global_step says 8


def test_the_clock_is_the_optimizer_that_stepped_most(tmp_path):
    class Twice(Gan):
        second = 2

    modifier, callback = recorded(tmp_path, Twice())
    assert modifier.batches == ["SLpPLpPLpPE"] * 4
    assert callback.clock.steps == [4, 8]
    assert callback.clock.global_step == 8


def test_max_steps_of_two_optimizers(tmp_path):
    _, callback = recorded(tmp_path, Gan(), max_epochs=-1, max_steps=6)
    assert callback.clock.event().total_steps == 3 == callback.clock.global_step


class ByHand(Regression):
    """Steps each optimizer ``steps`` times in every ``every``-th batch, in manual optimization."""

    def __init__(self, every=1, steps=(1,)):
        super().__init__()
        self.automatic_optimization = False
        self.every, self.steps = every, steps

    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), lr=0.01) for _ in self.steps]

    def training_step(self, batch, batch_idx):
        self.manual_backward(self.error(batch))
        for optimizer, steps in zip(self.optimizers(use_pl_optimizer=True), self.steps, strict=True):
            for _ in range(steps if batch_idx % self.every == self.every - 1 else 0):
                optimizer.step()

    def optimizers(self, use_pl_optimizer=True):
        optimizers = super().optimizers(use_pl_optimizer)
        return optimizers if isinstance(optimizers, list) else [optimizers]


BY_HAND = {
    "accumulation": {"every": 4},
    "five steps a batch": {"steps": (5,)},
    "one step each": {"steps": (1, 1)},
    "five of one, one of the other": {"steps": (5, 1)},
    "one optimizer in a batch, none in three": {"every": 4, "steps": (1, 2)},
}


class Windowed(RecordingModifier):
    """Records the index at each start of a batch, and the batches in which the window opened and closed."""

    _indices: list[float] = PrivateAttr(default_factory=list)
    _window: list[int] = PrivateAttr(default_factory=list)

    def on_event(self, state, event, **kwargs):
        super().on_event(state, event, **kwargs)
        if event.type_ == "batch_start":
            self._indices.append(event.current_index)

    def on_start(self, state, event, **kwargs):
        self._window.append(event.global_batch)

    on_end = on_start


@pytest.mark.parametrize("options", BY_HAND.values(), ids=BY_HAND)
@pytest.mark.parametrize(
    ("window", "limit", "length"),
    [
        ({"start": 1, "end": 2, "unit": "epoch"}, {}, 8),
        ({"start": 0.25, "end": 0.5, "unit": "fraction"}, {}, 32),
        ({"start": 0.25, "end": 0.5, "unit": "fraction"}, {"max_epochs": -1}, 32),
    ],
    ids=["epochs", "fraction of epochs", "fraction of max_steps"],
)
@pytest.mark.filterwarnings("error:.*never start", "error:.*past the end")
def test_windows_in_manual_optimization_go_by_batches(tmp_path, options, window, limit, length):
    """Four epochs of eight batches, however many steps a batch holds."""
    steps = 32 // options.get("every", 1) * sum(options.get("steps", (1,)))
    run = {"max_epochs": 4} | limit | ({"max_steps": steps} if limit else {})
    modifier = Windowed(**window)
    callback = CompressionCallback(modifier, evaluate=False)
    quiet(tmp_path, callback, **run).fit(ByHand(**options), Sums(batches=8))
    every = options.get("every", 1) if limit else 1  # max_steps are steps: they go on in jumps
    assert len(modifier._indices) == 32
    assert modifier._indices == [pytest.approx(batch // every * every / length) for batch in range(32)]
    assert modifier._window == [8, 15]  # the first batch of the window, and the last


def test_the_index_in_manual_optimization_survives_a_stop_inside_an_epoch(tmp_path):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, *args):
            if callback.clock.batches == 10:
                trainer.save_checkpoint(tmp_path / "cut.ckpt")
                raise KeyError("power cut")

    window = {"start": 1, "end": 2, "unit": "epoch"}
    callback = CompressionCallback(Windowed(**window), evaluate=False)
    with pytest.raises(KeyError, match="power cut"):
        quiet(tmp_path, callback, Stop(), max_epochs=4).fit(ByHand(every=4), Sums(batches=8))
    modifier = Windowed(**window)
    resumed = CompressionCallback(modifier, evaluate=False)
    quiet(tmp_path, resumed, max_epochs=4).fit(ByHand(every=4), Sums(batches=8), ckpt_path=tmp_path / "cut.ckpt")
    assert modifier._indices == [batch / 8 for batch in range(10, 32)]
    assert modifier._window == [10, 15]  # hooks go on again where the run is resumed


def test_a_raw_optimizer_gets_its_pre_step(tmp_path):
    class Raw(Gan):
        def training_step(self, batch, batch_idx):
            self.error(batch).backward()
            for optimizer in self.optimizers(use_pl_optimizer=False):
                optimizer.step()

    modifier, _ = recorded(tmp_path, Raw())
    assert modifier.batches == ["SpPpPE"] * 4  # a plain loss.backward() is unseen
    assert [s for n, s, _ in modifier._events if n == "OPTIM_PRE_STEP"] == [0, 1, 1, 2, 2, 3, 3, 4]


def test_lbfgs_calculates_the_loss_several_times_a_step(tmp_path):
    modifier, callback = recorded(tmp_path, Regression(torch.optim.LBFGS), limit_train_batches=2)
    for word in modifier.batches:
        assert word.startswith("SLpLp")
        assert word.endswith("LpPE")
    assert callback.clock.global_step == 2


def fp16():
    """What Lightning does on a GPU for 16-mixed."""
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))


def test_a_step_that_amp_skips_is_not_counted(tmp_path):
    class Overflows(Regression):
        def training_step(self, batch, batch_idx):
            return self.error(batch) * (float("inf") if batch_idx == 1 else 1.0)

    modifier, callback = recorded(tmp_path, Overflows(), plugins=[fp16()])
    assert modifier.batches == [STEP, "SLpE", STEP, STEP]
    assert callback.clock.global_step == 3


def test_the_loss_is_not_scaled_and_what_is_added_is(tmp_path):
    losses = []

    class Adds(RecordingModifier):
        def on_event(self, state, event, **kwargs):
            if event.type_ == "loss_calculated":
                losses.append(state.loss.item())
                state.loss.add_(state.model[2].weight.square().sum())

    def weights(folder, **options):
        torch.manual_seed(0)
        module = Regression()
        recorded(folder, module, Sums(shuffle=False), Adds(), limit_train_batches=2, **options)
        return torch.cat([p.detach().flatten() for p in module.parameters()])

    plain, scaled = weights(tmp_path / "a"), weights(tmp_path / "b", plugins=[fp16()])
    assert losses[:2] == pytest.approx(losses[2:], rel=0.01)
    torch.testing.assert_close(plain, scaled, rtol=0.02, atol=0.02)


def test_a_batch_that_the_module_skips_is_closed(tmp_path):
    class SkipsRest(Regression):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 2 else None

    modifier, _ = recorded(tmp_path, SkipsRest(), max_epochs=2)
    assert modifier.batches == [STEP, STEP, "SE"] * 2


def test_a_step_outside_of_a_batch_is_named(tmp_path):
    class Late(Gan):
        def training_step(self, batch, batch_idx):
            self.manual_backward(self.error(batch))

        def on_train_batch_end(self, *args):
            for optimizer in self.optimizers(use_pl_optimizer=False):
                optimizer.step()

    with pytest.warns(UserWarning, match="SGD stepped outside of a training batch"):
        modifier, callback = recorded(tmp_path, Late())
    assert modifier.batches == ["SLE"] * 4
    assert callback.clock.global_step == 4


def test_the_loss_can_be_added_to(tmp_path):
    class Adds(RecordingModifier):
        def on_event(self, state: State, event, **kwargs):
            super().on_event(state, event)
            if event.type_ == "loss_calculated":
                state.loss.add_(1e3 * state.model[2].weight.square().sum())

    module = Regression()
    modifier, _ = recorded(tmp_path, module, modifier=Adds(), limit_train_batches=1)
    assert modifier.batches == [STEP]
    before = Regression()
    torch.manual_seed(0)
    assert module.model[2].weight.abs().max() > 10 * before.model[2].weight.abs().max()  # lr 0.05 * 2e3 overshoots


@pytest.mark.parametrize("window", [{}, {"start": 2}, {"start": 1, "end": 2}, {"start": 0, "update": 3}], ids=str)
def test_leaving_out_events_that_nobody_hears_changes_nothing(tmp_path, window):
    """Batches in which no window is open cost nothing; what handlers see is the same as if every event were sent."""

    def seen(base, folder):
        class Notes(base):
            _notes: list = PrivateAttr(default_factory=list)

            def on_initialize(self, state, **kwargs):
                return True

            def on_start(self, state, event, **kwargs):
                self._notes.append(("start", event.type_.name, event.global_step, event.global_batch))

            def on_update(self, state, event, **kwargs):
                self._notes.append(("update", event.type_.name, event.global_step, event.global_batch))

            def on_end(self, state, event, **kwargs):
                self._notes.append(("end", event.type_.name, event.global_step, event.global_batch))

        modifier, callback = recorded(folder, modifier=Notes(**window))
        assert callback.clock.batches == 4 == callback.clock.global_step
        return modifier._notes

    notes = seen(Modifier, tmp_path / "a")
    assert notes == seen(RecordingModifier, tmp_path / "b")
    assert bool(notes) == bool(window)


def test_windows_open_and_close_where_they_say(tmp_path):
    modifier, _ = recorded(tmp_path, modifier=RecordingModifier(start=0.25, end=0.75, unit="fraction"), max_epochs=2)
    assert modifier._calls == ["initialize", "start at 2", "end at 6", "finalize"]


def test_an_endless_loader_refuses_epochs_at_once(tmp_path):
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            while True:
                yield torch.randn(8), torch.randn(1)

    loader = torch.utils.data.DataLoader(Endless(), 4)
    callback = CompressionCallback(RecordingModifier(start=0.5, unit="epoch"), evaluate=False)
    with pytest.raises(ValueError, match="needs a known steps_per_epoch"):
        quiet(tmp_path, callback, max_steps=3).fit(Regression(), loader)
    callback = CompressionCallback(RecordingModifier(start=0.5, unit="fraction"), evaluate=False)
    quiet(tmp_path, callback, max_epochs=-1, max_steps=3).fit(Regression(), loader)
    assert callback.clock.total_steps == 3


# -- INITIALIZE -------------------------------------------------------------------------------------------------------


def test_initialize_comes_before_optimizers(tmp_path):
    class Looks(RecordingModifier):
        def on_initialize(self, state, **kwargs):
            state.model.extra = torch.nn.Parameter(torch.ones(1))
            return True

    module = Regression()
    callback = CompressionCallback(Looks(), evaluate=False)
    trainer = quiet(tmp_path, callback, limit_train_batches=1)
    trainer.fit(module, Sums())
    assert any(module.model.extra is p for group in trainer.optimizers[0].param_groups for p in group["params"])


class BuiltLate(Regression):
    """The model is made in ``configure_model``."""

    def __init__(self):
        LightningModule.__init__(self)
        self.optimizer = torch.optim.SGD
        self.loss_net = torch.nn.Linear(3, 3)  # weights of something that is not the model

    def configure_model(self):
        if not hasattr(self, "model"):
            self.model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 1))


def test_initialize_waits_for_configure_model(tmp_path):
    module = BuiltLate()
    modifier, callback = recorded(tmp_path, module)
    assert modifier.batches == [STEP] * 4
    assert callback._state.model is module.model
    assert "configure_model" not in vars(module)  # undone


def test_initialize_waits_for_setup_of_the_module(tmp_path):
    class BuiltInSetup(BuiltLate):
        configure_model = LightningModule.configure_model

        def setup(self, stage):
            BuiltLate.configure_model(self)

    modifier, _ = recorded(tmp_path, BuiltInSetup(), max_epochs=1)
    assert modifier.batches == [STEP] * 4


def test_setup_is_idempotent(tmp_path):
    modifier = RecordingModifier()
    callback = CompressionCallback(modifier, evaluate=False)
    trainer, module = quiet(tmp_path, callback), Regression()
    trainer.validate(module, Sums(), verbose=False)
    assert modifier._calls == []
    trainer.fit(module, Sums())
    trainer.test(module, Sums(), verbose=False)
    trainer.fit_loop.max_epochs = 2
    with pytest.warns(UserWarning, match="compressed already"):
        trainer.fit(module, Sums())
    assert modifier._calls == ["initialize", "finalize"]
    assert modifier.batches == [STEP] * 4


def test_a_callback_belongs_to_one_module(tmp_path):
    callback = CompressionCallback(RecordingModifier(), evaluate=False)
    quiet(tmp_path / "a", callback).fit(Regression(), Sums())
    with pytest.raises(ValueError, match="make a new one for each model"):
        quiet(tmp_path / "b", callback).fit(Regression(), Sums())


def test_a_module_that_is_replaced_later_is_named(tmp_path):
    class Swaps(Regression):
        def on_fit_start(self):
            self.model = torch.nn.Sequential(torch.nn.Linear(8, 1))

    with pytest.raises(ValueError, match="is not the object that the modifiers were initialized on"):
        recorded(tmp_path, Swaps())


# -- exceptions -------------------------------------------------------------------------------------------------------


def test_an_exception_takes_everything_off_and_a_second_fit_goes_on(tmp_path):
    class Breaks(Regression):
        broken = True

        def training_step(self, batch, batch_idx):
            if batch_idx == 2 and self.broken:
                raise RuntimeError("boom")
            return super().training_step(batch, batch_idx)

    class Hooks(RecordingModifier):
        def on_start(self, state, event, **kwargs):
            self.hook(state.model[0], lambda module, args: None)

    module, modifier = Breaks(), Hooks(start=0)
    callback = CompressionCallback(modifier, evaluate=False)
    trainer = quiet(tmp_path, callback)
    with pytest.raises(RuntimeError, match="boom"):
        trainer.fit(module, Sums())
    assert modifier.batches == [STEP, STEP, "S"]
    assert not module.model[0]._forward_pre_hooks
    assert not trainer.optimizers[0]._optimizer_step_post_hooks
    assert not callback.done
    module.broken = False
    quiet(tmp_path, callback).fit(module, Sums())
    assert modifier.batches[3:] == [STEP] * 4
    assert callback.done


def test_hooks_of_optimizers_come_off_at_the_end(tmp_path):
    callback = CompressionCallback(RecordingModifier(), evaluate=False)
    trainer = quiet(tmp_path, callback)
    trainer.fit(Regression(), Sums())
    assert not trainer.optimizers[0]._optimizer_step_post_hooks


# -- arguments --------------------------------------------------------------------------------------------------------


def test_one_modifier_a_list_or_a_dict():
    one, two = RecordingModifier(), RecordingModifier(group="second")
    assert CompressionCallback(one).lifecycle.modifiers == [one]
    assert CompressionCallback([one, two]).lifecycle.modifiers == [one, two]
    assert CompressionCallback({"b": two, "a": one}).lifecycle.modifiers == [two, one]


@pytest.mark.parametrize("given", ["neither", "both"])
def test_modifiers_or_recipe(given):
    arguments = {"modifiers": RecordingModifier(), "recipe": "gptq_w4"} if given == "both" else {}
    with pytest.raises(ValueError, match=f"expected either modifiers or recipe, got {given}"):
        CompressionCallback(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"calibration_batches": 0}, "calibration_batches=0: expected at least 1"),
        ({"eval_batches": 0}, "evaluate=False"),
        ({"walk": "backwards"}, "walk='backwards': expected 'auto'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        CompressionCallback(RecordingModifier(), **arguments)


def test_lightning_cli_builds_it(tmp_path):
    spec = {
        "class_path": "lightning_compress.CompressionCallback",
        "init_args": {
            "modifiers": {
                "a": {"class_path": "tests.support.training_runs.RecordingModifier", "init_args": {"start": 2}}
            },
            "module": "model",
            "blocks": ["Linear"],
            "calibration_batches": 3,
            "export_dir": str(tmp_path / "out"),
        },
    }
    cli = LightningCLI(
        Regression, Sums, run=False, save_config_callback=None,
        args={"trainer": {"callbacks": [spec], "logger": False, "accelerator": "cpu"}},
    )  # fmt: skip
    callback = next(c for c in cli.trainer.callbacks if isinstance(c, CompressionCallback))
    assert callback.lifecycle.modifiers[0].start == 2
    assert callback.options.calibration.blocks == ["Linear"]
    assert callback.options.calibration_batches == 3


def test_lightning_cli_names_an_unknown_argument(capsys):
    spec = {"class_path": "lightning_compress.CompressionCallback", "init_args": {"recipe": "rtn_w4", "bitz": 4}}
    with pytest.raises(SystemExit):
        LightningCLI(Regression, Sums, run=False, args={"trainer": {"callbacks": [spec]}})
    assert "bitz" in capsys.readouterr().err


def test_an_entry_that_no_modifier_answers_to_is_named():
    """As after ``callbacks.compress.modifiers.gtpq.group_size=64``, where the recipe calls it gptq."""
    with pytest.raises(
        ValueError, match=r"modifiers.gtpq is \{'group_size': 64\}, expected a Modifier; .* are modifiers: gptq$"
    ):
        CompressionCallback({"gptq": GPTQModifier(scheme="W4A16"), "gtpq": {"group_size": 64}})


GROUPS = {"w3": {"targets": ["Linear"], "weights": {"num_bits": 3, "strategy": "group", "group_size": "auto"}}}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("GPTQModifier", {"config_groups": GROUPS, "actorder": None}),
        ("QuantizationModifier", {"scheme": {"W4A16": ["re:.*0"], "W8A16": "re:.*2"}, "group_size": [64, -1]}),
        ("AWQModifier", {"config_groups": GROUPS}),
        ("WandaPruningModifier", {"sparsity": {"re:.*0": 0.5, "Linear": 0.25}}),
        ("SparseGPTModifier", {"mask_structure": "2:4"}),
        ("MovementPruningModifier", {"end": 1.0, "unit": "fraction", "mode": "soft"}),
        ("ConstantPruningModifier", {"targets": "Linear"}),
    ],
)
def test_lightning_cli_builds_nested_modifiers_with_all_their_defaults(name, arguments):
    nested = {"a": {"class_path": f"lightning_compress.{name}", "init_args": arguments}}
    spec = {"class_path": "lightning_compress.CompressionCallback", "init_args": {"modifiers": nested}}
    cli = LightningCLI(
        Regression, Sums, run=False, save_config_callback=None,
        args={"trainer": {"callbacks": [spec], "logger": False, "accelerator": "cpu"}},
    )  # fmt: skip
    callback = next(c for c in cli.trainer.callbacks if isinstance(c, CompressionCallback))
    (modifier,) = callback.lifecycle.modifiers
    assert modifier.model_dump() == getattr(lightning_compress, name)(**arguments).model_dump()


@pytest.mark.parametrize("epochs", [0, 2])
def test_training_end_comes_once_whether_or_not_anything_was_trained(tmp_path, epochs):
    recording = RecordingModifier()
    data = Sums()
    trainer = quiet(tmp_path, CompressionCallback(recording), max_epochs=epochs)
    trainer.fit(Regression(), data)
    steps = trainer.global_step
    assert recording._events[-1] == ("TRAINING_END", steps, steps)
    assert recording.names.count("TRAINING_END") == 1
    assert recording._calls[-1] == "finalize"
