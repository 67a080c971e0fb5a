"""Compression as a Lightning callback: the Trainer's hooks become events of the lifecycle.

Which hook emits which event: docs/index.md, "The lifecycle". The work behind a hook is in training/: set_up.py,
post_training.py, results.py, and what resumes a run.
"""

from contextlib import ExitStack
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from lightning_compress.calibration.options import CalibrationPrecision, Walk
from lightning_compress.core.events import Event, EventType
from lightning_compress.core.ledger import Ledger
from lightning_compress.core.lifecycle import Lifecycle
from lightning_compress.core.modifier import Modifier
from lightning_compress.core.state import State
from lightning_compress.recipe import dump_recipe
from lightning_compress.training import random_state
from lightning_compress.training.best_weights import check_best
from lightning_compress.training.checkpoint_state import check_same_recipe, complete, readable, warn_of_missing_parts
from lightning_compress.training.checks import (
    averages,
    check_fit,
    check_lightning,
    check_plain,
    check_same_module,
    check_windows,
    tensor_bytes,
    warn_of_compressed_model,
    warn_of_no_fit,
    warn_of_stray_step,
)
from lightning_compress.training.clock import StepClock
from lightning_compress.training.compiled import HookWatch
from lightning_compress.training.loss_scale import unscaled
from lightning_compress.training.options import read_arguments
from lightning_compress.training.outputs import FolderLock
from lightning_compress.training.planned import plan_run
from lightning_compress.training.post_training import PostTraining
from lightning_compress.training.preemption import name_ended_ranks
from lightning_compress.training.pruned_checkpoints import carry_shapes
from lightning_compress.training.resume import go_on, is_resumed, load_earlier_end
from lightning_compress.training.run import Run
from lightning_compress.training.set_up import check_before_training, initialize, when_built
from lightning_compress.training.sharding import reshard_between
from lightning_compress.training.submodule import choose

__all__ = ["CompressionCallback"]

E = EventType


class CompressionCallback(Callback):
    r"""Compress the model that a Trainer trains.

    Args:
        modifiers: One modifier, several in order, or a dict of them (its order counts).
        recipe: Name (``gptq_w4``) or path of a recipe, instead of modifiers; it may set the arguments below, too.
        module: Dotted name of the module to compress inside the LightningModule, ``"."`` for all of it. By default the
            one transformers.PreTrainedModel, else ``model``, ``net`` or ``backbone``, else the only child with weights.
        export_dir: Folder of the compressed model; by default ``compressed`` in ``default_root_dir``, by ``report``.
        calibration_batches: Largest number of calibration batches: the first of
            ``datamodule.calibration_dataloader()``, else samples of the training set, chosen with ``seed``.
        blocks: Names, classes or ``re:`` patterns of the model's repeated blocks; by default they are searched for.
        walk: How calibration goes through the blocks: ``auto``, ``one_pass``, ``two_pass`` or ``whole``.
        load_best: Compress the best weights of a ModelCheckpoint with a monitor, not the last ones.
        evaluate: Measure the model before and after, on the validation set.
        eval_batches: Batches of each validation loader to measure on; by default as many as the Trainer validates on.
        offload_device: Device on which calibration stores activations.
        allow_recipe_change: Resume from a checkpoint that was written with another recipe.
        seed: Seed of the choice of calibration samples, and of the random state while calibrating.
        moe_calibrate_all_experts: Statistics of experts that share one tensor use all tokens.
        memory_limit: Bytes, or such as ``16GB``, that ``walk="auto"`` may use beside the model.
        calibration_precision: Of a model trained in mixed precision: ``trained``, ``float32`` or ``auto`` (by device).
        cache_activations: Where the inputs of blocks are stored: ``memory``, ``disk`` or the path of a folder.
        verify: Whether plain transformers, in a process of its own, answers a batch from the exported folder as the
            model does; if not, a warning says so. ``auto``: for its models, up to 2 GB on disk (some 10 seconds).
        resume: Of a calibration that was killed: ``auto``, ``never`` (it begins anew) or ``must``; see docs/index.md.
        gate: Largest change of a metric by compression, such as ``{metric: val/loss, max_increase: 0.02}``.
        on_gate: Where it does not hold: ``fail``, or ``promote`` the modules with the largest errors to more bits.
        hub: Push the export to Hugging Face's hub: ``{repo: user/name, private: true}`` (the default is private).
        export: ``compressed_tensors``, ``onnx`` and ``gguf`` (in ``compressed_onnx``, ... beside it): one, or a list.
        plan: True: print what the run would do and take, and end; ``compare``: go on, and show it in the report, too.

    Raises:
        ValueError: Neither or both of ``modifiers`` and ``recipe`` are given, or one of them is wrong.

    Example::

        trainer = Trainer(callbacks=[CompressionCallback(GPTQModifier(scheme="W4A16"))])
        trainer.fit(model, datamodule)
        trainer.test(ckpt_path="best", datamodule=datamodule)      # the compressed model
    """

    def __init__(
        self,
        modifiers: Modifier | list[Modifier] | dict[str, Modifier] | None = None,
        *,
        recipe: str | None = None,
        module: str | None = None,
        export_dir: str | None = None,
        calibration_batches: int = 16,
        blocks: str | list[str] | None = None,
        walk: Walk = "auto",
        load_best: bool = True,
        evaluate: bool = True,
        eval_batches: int | None = None,
        offload_device: str | None = "cpu",
        allow_recipe_change: bool = False,
        seed: int = 0,
        moe_calibrate_all_experts: bool = False,
        memory_limit: int | str | None = None,
        calibration_precision: CalibrationPrecision = "auto",
        cache_activations: str = "memory",
        verify: bool | str = "auto",
        resume: str = "auto",
        plan: bool | str = False,
        export: str | list[str] = "compressed_tensors",
        gate: dict[str, Any] | list[dict[str, Any]] | None = None,
        on_gate: Literal["fail", "promote"] = "fail",
        hub: dict[str, Any] | None = None,
    ):
        arguments = {name: value for name, value in locals().items() if name not in ("self", "modifiers", "recipe")}
        ordered, self.options = read_arguments(modifiers, recipe, arguments)
        self.lifecycle = Lifecycle(ordered)
        self.ledger = Ledger()
        self.recipe = dump_recipe(self.lifecycle.modifiers)
        self.run = Run(self.options, self.recipe)
        self.clock, self.done = StepClock(), False
        self._root: LightningModule | None = None
        self._state = self._batch_state = State(ledger=self.ledger)
        self._in_batch = self._acting = False  # acting: in this batch some modifier may act
        self._windowed = self.lifecycle.windowed
        self._stage: str | None = None
        self._receiver: LightningModule | None = None  # a checkpoint is being loaded into it
        self._lock = FolderLock()
        self._cleanup = ExitStack()  # takes off what setup put on the LightningModule and the Trainer
        self._hook_watch = HookWatch()
        self._dense_is_known = False  # a window has opened: the model is no longer dense
        self._warned_stray_step = False
        self._knows_checkpoint = False  # one with a state of this callback was loaded
        self._random = random_state.LoadedRandomState()
        self._resumed = False  # this fit goes on from a checkpoint; until training has begun
        self._trained = False  # a batch of this fit

    # -- INITIALIZE ---------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_lightning(trainer, pl_module)
        self._stage = stage
        self.teardown()
        self._cleanup.enter_context(carry_shapes(pl_module, self.options.module))
        if stage != "predict":
            self._cleanup.enter_context(self.run.in_team(trainer))
        if stage != "fit":
            return
        check_fit(trainer, pl_module, self, self._root)
        if self.done:
            return
        self._root, self._trained = pl_module, False
        self._cleanup.callback(self.run.saved_files.watch(trainer))
        self._state = self._state.but(team=self.run.team)
        if not self.lifecycle.initialized:
            built = when_built(pl_module, self.options.module, lambda: self._initialize(trainer, pl_module))
            self._cleanup.enter_context(built)

    def _initialize(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.lifecycle.initialized:
            return
        name, model = choose(pl_module, self.options.module)
        self._state = self._batch_state = self._state.but(model=model)
        plan_run(trainer, pl_module, model, self.lifecycle.modifiers, self.run)
        self.run.facts.setdefault("model_bytes_before", tensor_bytes(model, trainer.precision))  # before any cut
        initialize(trainer, pl_module, name, self.lifecycle, self._state, self.clock.event(E.BATCH_START))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.run.outputs = None
        if self.done:
            return
        if self._state.model is not None:  # not in setup: configure_model comes after it
            check_before_training(trainer, pl_module, self._state, self.options, self.lifecycle.modifiers)
        if not trainer.fast_dev_run:  # not in setup: only now it is known whether a run is resumed
            self.run.claim_outputs(trainer, self._lock, resumed=is_resumed(trainer))
            if self.options.load_best:
                check_best(trainer, self.lifecycle, self.run.saved_files)

    # -- the training loop --------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.done:
            warn_of_compressed_model()
            return
        if not is_resumed(trainer):  # what was loaded is where Lightning's tuner began
            self._random.states, self._resumed = None, False
        check_same_module(pl_module, self.options.module, self._state.model)
        self.clock.measure_run(trainer, pl_module)
        check_windows(trainer, self.lifecycle.modifiers, self.clock.event())
        self.clock.attach(trainer.optimizers, self._before_count, self._after_count)
        if self._resumed:
            self.run.add_repeated_batches(go_on(trainer, self._random, self.run.loader_states))
        self._resumed = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.done:
            return
        self._random.restore()  # inside an epoch here: a loader that began again has drawn its order
        if not self._trained:
            self._post_training(trainer, pl_module, self.clock.event()).check_input(batch)
        self._in_batch = self._trained = True
        if self._windowed or self.lifecycle.acting:
            event = self.clock.event(E.BATCH_START)
            reshard_between(trainer, pl_module)
            self._before_windows(trainer, pl_module, event)
            self._batch_state = self._state.but(batch_data=batch, optimizer=trainer.optimizers)
            self.lifecycle.emit(self._batch_state, event)
            self._acting = self.lifecycle.acting  # otherwise the rest of the batch costs nothing
            self._hook_watch.update(self.lifecycle.modifiers, pl_module)

    def _before_windows(self, trainer: Trainer, pl_module: LightningModule, event: Event) -> None:
        """Where a window opens: measure the dense model, once, and calibrate what later modifiers train on."""
        starting = (m.start is not None and m.should_start(event) for m in self.lifecycle.modifiers)
        if not self._dense_is_known and any(starting):
            self._dense_is_known = True
            if self.options.evaluate and not trainer.fast_dev_run:
                self._post_training(trainer, pl_module, event).measure_dense()
        if (handing_over := self.lifecycle.handing_over(event)) is not None:
            rank_zero_info(f"calibrating at step {event.global_step}; training goes on from the result")
            self._post_training(trainer, pl_module, event, handing_over).hand_over()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._acting:
            with unscaled(trainer, loss):
                self.lifecycle.emit(self._batch_state.but(loss=loss), self.clock.event(E.LOSS_CALCULATED))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._acting:
            self.lifecycle.emit(self._batch_state.but(optimizer=optimizer), self.clock.event(E.OPTIM_PRE_STEP))

    def _before_count(self, optimizer: Optimizer) -> None:
        """A torch optimizer that is stepped past Lightning, in manual optimization, gets its PRE_STEP late."""
        if self._acting and self.lifecycle.last != E.OPTIM_PRE_STEP:
            self.lifecycle.emit(self._batch_state.but(optimizer=optimizer), self.clock.event(E.OPTIM_PRE_STEP))

    def _after_count(self, optimizer: Optimizer) -> None:
        if self._acting:
            self.lifecycle.emit(self._batch_state.but(optimizer=optimizer), self.clock.event(E.OPTIM_POST_STEP))
        elif not self._in_batch and not self._warned_stray_step:
            self._warned_stray_step = True
            warn_of_stray_step(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._close_batch()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close_batch()  # still open when on_train_batch_start of the LightningModule returned -1

    def _close_batch(self) -> None:
        if not self._in_batch:
            return
        if self._acting:
            self.lifecycle.emit(self._batch_state, self.clock.event(E.BATCH_END))
            self._hook_watch.update(self.lifecycle.modifiers, self._root)
        else:
            self.lifecycle.skip_batch()
        self.clock.batches += 1
        self._forget_batch()

    def _forget_batch(self) -> None:
        self._in_batch = self._acting = False
        self._batch_state = self._state

    # -- the end ------------------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.done:
            return
        for checkpoints in trainer.checkpoint_callbacks:
            checkpoints.on_train_end(trainer, pl_module)  # what it saves now is the last of training: not compressed
        self._finish(trainer, pl_module, trained=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.done:
            rank_zero_info("nothing was left to train; compressing the model as it is")
            self._random.restore()
            pl_module.to(trainer.strategy.root_device)  # the strategy has moved it back to the CPU
            for averaging in (c for c in trainer.callbacks if self.clock.global_step and averages(c)):
                averaging.on_train_end(trainer, pl_module)  # its average becomes the model, as in training
            self._finish(trainer, pl_module, trained=False)
            pl_module.cpu()

    def _finish(self, trainer: Trainer, pl_module: LightningModule, *, trained: bool) -> None:
        self.clock.detach()
        check_same_module(pl_module, self.options.module, self._state.model)
        outputs = self.run.outputs
        if not self._trained:
            if earlier := load_earlier_end(trainer, pl_module, self.run, self.state_key, self.state_dict()):
                self.load_state_dict(earlier)
                return
        post_training = self._post_training(trainer, pl_module, self.clock.event())
        self.run.preemption.before_compression(trained=trained)
        post_training.compress()
        self.done = True  # before compressed.ckpt is saved: a run that resumes from it has nothing left to do
        post_training.write_results()
        if outputs is not None:
            self.run.preemption.checkpoints.supersede(outputs.checkpoint)
        post_training.end()

    def _post_training(
        self, trainer: Trainer, pl_module: LightningModule, event: Event, lifecycle: Lifecycle | None = None
    ) -> PostTraining:
        lifecycle = self.lifecycle if lifecycle is None else lifecycle
        return PostTraining(trainer, pl_module, lifecycle, self._state, self.run, event, self.clock.state_dict())

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.run.preemption.begin_evaluation()

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.run.preemption.after_evaluation_batch()

    on_test_batch_end = on_validation_batch_end

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.run.preemption.begin_evaluation()
        if self._root is None and not self.done and not self._knows_checkpoint:
            warn_of_no_fit()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        name_ended_ranks(self.run.team, exception)
        self._forget_batch()
        self.lifecycle.abort()
        self.teardown()

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        self.clock.detach()
        self._lock.release()
        self._cleanup.close()

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Primitives and tensors, so that ``weights_only`` loading works; TypeError names what is neither."""
        state = {
            "recipe": self.recipe,
            "modifiers": self.lifecycle.state_dict(),
            "clock": self.clock.state_dict(),
            "ledger": self.ledger.state_dict(),
            "done": self.done,
            "random": [random_state.collect()],
            "run": self.run.name,
            "facts": self.run.carried_facts,
        }
        check_plain(state, "CompressionCallback.state_dict()")
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; only fit resumes, validate and test load weights alone.

        Raises:
            ValueError: The checkpoint was written with another recipe, and ``allow_recipe_change`` is not set; or its
                state is not one that this version writes.
        """
        self._knows_checkpoint = True
        receiver, self._receiver = self._receiver, None
        with readable():
            if self._stage in (None, "fit"):
                self._resume(state_dict)
            elif self.lifecycle.initialized and not self.lifecycle.finalized:  # cut short, now tested
                self.lifecycle.weights_loaded(state_dict["modifiers"])
            elif not self.done and receiver is not None:
                warn_of_missing_parts(self.lifecycle, state_dict, receiver)

    def _resume(self, state: dict[str, Any]) -> None:
        if not self.options.allow_recipe_change:
            check_same_recipe(state["recipe"], self.recipe)
        modifiers = dict(state["modifiers"].items())
        for key, modifier in zip(self.lifecycle.keys(), self.lifecycle.modifiers, strict=True):
            if key in modifiers:
                modifier.load_state_dict(modifiers[key])
        self.clock.load_state_dict(state["clock"])
        self.ledger.load_state_dict(state["ledger"])
        self.done = state["done"]
        self._random.states, self._resumed = state.get("random"), True
        self.run.resume(state)
        self._dense_is_known = any(modifier["started"] for modifier in modifiers.values())
        if self.done:
            self.lifecycle.abort()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Lightning calls this right before :meth:`load_state_dict`."""
        self._receiver = pl_module

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        complete(checkpoint, self.state_key, trainer, self._state.model, compressed=self.done)
