"""Compression as a Lightning callback: the Trainer's hooks become events of the lifecycle.

    event              emitted from
    INITIALIZE         setup (stage fit); where the model is not built yet, right after configure_model
    BATCH_START        on_train_batch_start
    LOSS_CALCULATED    on_before_backward
    OPTIM_PRE_STEP     on_before_optimizer_step, before gradients are clipped
    OPTIM_POST_STEP    torch's step-post-hook of each optimizer: only steps that were made
    BATCH_END          on_train_batch_end
    TRAINING_END       on_train_end; on_fit_end where training was skipped and on_train_end never came
    CALIBRATION_...    the same, where a modifier calibrates
    FINALIZE           the same, at last

What happens at the end (best weights, metric, calibration, metric again, export, report) is in
training/post_training.py.
"""

from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.calibration.blocks import find_blocks
from lightning_compress.calibration.options import Walk, check_device
from lightning_compress.core.events import Event, EventType
from lightning_compress.core.interruption import check_uninterrupted
from lightning_compress.core.ledger import Ledger
from lightning_compress.core.lifecycle import Lifecycle
from lightning_compress.core.modifier import Modifier
from lightning_compress.core.state import State
from lightning_compress.export.experts import planned_fault
from lightning_compress.export.rehearsal import rehearse
from lightning_compress.layers.forward import patched
from lightning_compress.layers.split_experts import split_while
from lightning_compress.quant.arguments import QuantizationArguments
from lightning_compress.quant.record import Quantized
from lightning_compress.recipe import dump_recipe, read_recipe, recipe_difference
from lightning_compress.training import mid_epoch_resume, random_state
from lightning_compress.training.checks import (
    averages,
    check_averaging,
    check_lightning,
    check_order,
    check_plain,
    check_strategy,
    check_whole,
    check_windows,
    tensor_bytes,
    tensor_names,
)
from lightning_compress.training.clock import StepClock
from lightning_compress.training.hyperparameters import write_plain_modules
from lightning_compress.training.options import merge_options, named_modifiers
from lightning_compress.training.outputs import FolderLock, Outputs
from lightning_compress.training.post_training import Finish, check_best, is_resumed, processors
from lightning_compress.training.pruned_checkpoints import carry_shapes, check_launcher, write_shapes
from lightning_compress.training.rank_zero import alone
from lightning_compress.training.resume_finished import earlier_end, new_run
from lightning_compress.training.samples import OwnBatches
from lightning_compress.training.saved_files import SavedFiles
from lightning_compress.training.sigterm import stopped_by_sigterm
from lightning_compress.training.slurm_requeue import requeue_only, supersede
from lightning_compress.training.submodule import choose, is_compiled

__all__ = ["CompressionCallback"]

E = EventType
# what a resumed run cannot find out again
EARLIER_FACTS = ("model_bytes_before", "metric_dense", "batches_repeated_on_resume", "beside_weights")


class CompressionCallback(Callback):
    r"""Compress the model that a Trainer trains.

    Args:
        modifiers: One modifier, several in order, or a dict of them (its order counts).
        recipe: Instead of modifiers the name of a recipe (``gptq_w4``) or the path of a recipe file. What the recipe
            sets beside its modifiers counts where the argument below has its default.
        module: Dotted name of the module to compress inside the LightningModule, ``"."`` for all of it. By default the
            one transformers.PreTrainedModel, else ``model``, ``net`` or ``backbone``, else the only child with weights.
        export_dir: Where the compressed model goes; by default ``compressed`` in the Trainer's ``default_root_dir``.
            The report lies beside it, in ``report``, and so does ``compressed.ckpt``.
        calibration_batches: How many batches calibrate, at most: those of ``datamodule.calibration_dataloader()``, else
            samples of the training set, chosen with ``seed``.
        blocks: Names, classes or ``re:`` patterns of the model's repeated blocks; by default they are found.
        walk: How calibration goes through the blocks: ``auto``, ``one_pass``, ``two_pass`` or ``whole``.
        load_best: Compress the best weights that a ModelCheckpoint with a monitor has kept, not the last ones.
        evaluate: Measure the model before and after, on the validation set.
        eval_batches: Batches of each validation loader to measure on; by default as many as the Trainer validates on.
        offload_device: Where calibration keeps activations.
        allow_recipe_change: Resume from a checkpoint that was written with another recipe.
        seed: Of the calibration samples, and of whatever is random while calibrating.
        moe_calibrate_all_experts: As in :func:`lightning_compress.compress`.
        verify: Whether plain transformers, in a process of its own, answers a batch from the exported folder as the
            model does; if not, a warning says so. ``auto``: for its models, up to 2 GB on disk (some 10 seconds).

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
        verify: bool | str = "auto",
    ):
        arguments: dict[str, Any] = {
            "module": module,
            "export_dir": export_dir,
            "calibration_batches": calibration_batches,
            "blocks": blocks,
            "walk": walk,
            "load_best": load_best,
            "evaluate": evaluate,
            "eval_batches": eval_batches,
            "offload_device": offload_device,
            "allow_recipe_change": allow_recipe_change,
            "seed": seed,
            "moe_calibrate_all_experts": moe_calibrate_all_experts,
            "verify": verify,
        }
        if (modifiers is None) == (recipe is None):
            both = "both" if modifiers is not None else "neither"
            raise ValueError(f"expected either modifiers or recipe, got {both}: CompressionCallback(recipe='gptq_w4')")
        settings: Mapping[str, Any] = {}
        if recipe is not None:
            read = read_recipe(recipe)
            modifiers, settings = read.modifiers, read.arguments
        assert modifiers is not None
        self.options = merge_options(arguments, settings, recipe)
        self.lifecycle = Lifecycle(named_modifiers(modifiers))
        self.ledger = Ledger()
        self.recipe = dump_recipe(self.lifecycle.modifiers)
        self.done = False
        self.clock = StepClock()
        self._root: LightningModule | None = None
        self._state = State(ledger=self.ledger)
        self._batch_state = self._state
        self._in_batch = False
        self._acting = False  # in this batch some modifier may act
        self._windowed = any(m.start is not None for m in self.lifecycle.modifiers)
        self._stage: str | None = None
        self._saved_files = SavedFiles()
        self._own_batches = OwnBatches()
        self._receiver: LightningModule | None = None  # whom a checkpoint is being loaded into
        self._outputs: Outputs | None = None  # where this fit writes; None in a fast_dev_run
        self._lock = FolderLock()
        self._seconds: dict[str, float] = {}  # of what was done in the midst of training, for the report
        self._facts: dict[str, Any] = {}
        self._dense_is_known = False  # a window has opened: the model is no longer dense
        self._warned_stray_step = False
        self._knows_checkpoint = False  # one with a state of this callback was loaded
        self._patches = ExitStack()  # of methods of the module and of the writer of checkpoints
        self._random: list[dict[str, Any]] | None = None  # of each rank, from a checkpoint; until it is restored
        self._resumed = False  # this fit goes on from a checkpoint; until training has begun
        self._hooked: list[nn.Module] = []  # modules with hooks, when the model was last compiled
        self._run = new_run()
        self._trained = False  # a batch of this fit

    # -- INITIALIZE ---------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_lightning(trainer, pl_module)
        self._stage = stage
        self._take_off()
        self._patches.enter_context(carry_shapes(pl_module, self.options.module))
        if stage != "fit":
            return
        check_strategy(trainer)
        check_order(trainer, self)
        if self._root is not None and self._root is not pl_module:
            raise ValueError(
                "this CompressionCallback has compressed, or begun to compress, another LightningModule; "
                "make a new one for each model"
            )
        if self.done:
            return
        self._root, self._trained = pl_module, False
        self._patches.callback(self._saved_files.watch(trainer))
        if not self.lifecycle.initialized and not self._initialize_now(trainer, pl_module):
            self._initialize_after_configure_model(trainer, pl_module)

    def _initialize_now(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """False when the model may not be built yet."""
        built_later = is_overridden("configure_model", pl_module) or is_overridden("setup", pl_module)
        try:
            name, module = choose(pl_module, self.options.module)
        except ValueError:
            if built_later:
                return False
            raise
        certain = self.options.module is not None or name in ("model", "net", "backbone")
        if built_later and (not certain or next(module.parameters(), None) is None):
            return False
        self._initialize(trainer, pl_module)
        return True

    def _initialize_after_configure_model(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning calls ``configure_model`` between all setup hooks and the making of optimizers."""
        original = pl_module.configure_model

        def configure_model() -> None:
            original()
            if not self.lifecycle.initialized:
                self._initialize(trainer, pl_module)

        self._patches.enter_context(patched(pl_module, configure_model=configure_model))

    def _initialize(self, trainer: Trainer, pl_module: LightningModule) -> None:
        name, module = choose(pl_module, self.options.module)
        self._state = self._batch_state = State(model=module, ledger=self.ledger)
        reshaping = any(m.needs.changes_shapes for m in self.lifecycle.modifiers)
        if reshaping:
            check_launcher(trainer)
        self._facts.setdefault("model_bytes_before", tensor_bytes(module, trainer.precision))  # before anything is cut
        before = tensor_names(pl_module)
        with nullcontext() if self._windowed else split_while(module):  # who trains wants experts in one tensor
            self.lifecycle.initialize(self._state, self.clock.event(E.BATCH_START))
            self._warn_of_readers(module)
        check_averaging(trainer, name, reshaping, tensor_names(pl_module) != before)

    def _warn_of_readers(self, module: nn.Module) -> None:
        """What plain transformers is known not to read is told before the run, not after it."""
        schemes: dict[str, Any] = {}
        for modifier in self.lifecycle.modifiers:
            if isinstance(modifier, QuantizationArguments):
                schemes |= modifier.planned
        if fault := planned_fault(module, schemes):
            rank_zero_warn(fault)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.done and self._state.model is not None:
            check_uninterrupted(self._state.model)
            check_whole(self._state.model)  # not in setup: configure_model comes after it
            if self.options.calibration.blocks is not None:
                find_blocks(self._state.model, self.options.calibration.blocks)  # names that match nothing are told now
            model, beside = self._state.model, processors(trainer, pl_module)
            alone(lambda: rehearse(model, beside), "looking at what will be exported")
            check_device(self.options.calibration)
        self._outputs = None
        if not self.done and not trainer.fast_dev_run:
            self._prepare_outputs(trainer)  # not in setup: only now it is known whether a run is resumed
            check_best(trainer, self.options, self.lifecycle, self._saved_files)

    def _prepare_outputs(self, trainer: Trainer) -> None:
        """Resolve and check where this run writes, and keep other runs out."""
        outputs = self._outputs = Outputs.of(trainer, self.options.export_dir)

        def prepare() -> None:
            for path in outputs.locks:
                self._lock.acquire(path, self._run)
            outputs.check(resumed=is_resumed(trainer), run=self._run)

        alone(prepare, "looking at export_dir")

    # -- the training loop --------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.done:
            rank_zero_warn(
                "this model is compressed already: CompressionCallback does nothing more, and training on takes the "
                "weights off their grid; to compress again, train from a dense checkpoint with a new callback"
            )
            return
        if not is_resumed(trainer):  # what was loaded is where Lightning's tuner began
            self._random, self._resumed = None, False
        self._check_module(pl_module)
        self.clock.measure(
            trainer.num_training_batches,
            trainer.accumulate_grad_batches,
            trainer.max_epochs,
            trainer.max_steps,
            len(trainer.optimizers),
            manual=not pl_module.automatic_optimization,
        )
        check_windows(trainer, self.lifecycle.modifiers, self.clock.event())
        self.clock.attach(trainer.optimizers, self._before_count, self._after_count)
        if self._resumed:
            mid_epoch_resume.restore_loaders(trainer)
            if repeated := mid_epoch_resume.repeated_batches(trainer):
                self._facts["batches_repeated_on_resume"] = self._facts.get("batches_repeated_on_resume", 0) + repeated
                rank_zero_warn(
                    f"this run is resumed after batch {repeated} of an epoch, and its training loader has no state: it "
                    f"begins the epoch anew, so that {repeated} batches come again and as many at the end are left "
                    f"out; resume from the end of an epoch, or use a loader with a state, such as "
                    f"torchdata's StatefulDataLoader"
                )
        if self._resumed and mid_epoch_resume.after_last_batch(trainer):
            self._restore_random()
            mid_epoch_resume.begin_epoch(trainer)
        self._resumed = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.done:
            return
        self._restore_random()  # inside an epoch here: a loader that began anew has drawn its order
        if not self._trained:
            self._ending(trainer, pl_module, self.lifecycle, self.clock.event()).check_input(batch)
        self._in_batch = self._trained = True
        if self._windowed or self.lifecycle.acting:
            event = self.clock.event(E.BATCH_START)
            self._measure_dense(trainer, pl_module, event)
            self._hand_over(trainer, pl_module, event)
            self._batch_state = self._state.but(batch_data=batch, optimizer=trainer.optimizers)
            self.lifecycle.emit(self._batch_state, event)
            self._acting = self.lifecycle.acting  # else the rest of the batch costs nothing
            self._show_hooks(pl_module)

    def _measure_dense(self, trainer: Trainer, pl_module: LightningModule, event: Event) -> None:
        """Measure the model once, before the first window opens: what training compresses is compared with that."""
        if self._dense_is_known:
            return
        if not any(m.start is not None and m.should_start(event) for m in self.lifecycle.modifiers):
            return
        self._dense_is_known = True
        if self.options.evaluate and not trainer.fast_dev_run:
            self._ending(trainer, pl_module, self.lifecycle, event).measure_dense()

    def _hand_over(self, trainer: Trainer, pl_module: LightningModule, event: Event) -> None:
        """Calibrate now where another modifier trains on from the result."""
        handing = self.lifecycle.handing_over(event)
        if handing is None:
            return
        rank_zero_info(f"calibrating at step {event.global_step}; training goes on from the result")
        self._ending(trainer, pl_module, handing, event).hand_over()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if not self._acting:
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = scaler.get_scale() if scaler is not None else 1.0
        if scale != 1.0:
            loss.div_(scale)  # fp16: modifiers see the loss itself, and what they add is scaled too
        self.lifecycle.emit(self._batch_state.but(loss=loss), self.clock.event(E.LOSS_CALCULATED))
        if scale != 1.0:
            loss.mul_(scale)

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
            rank_zero_warn(
                f"a {type(optimizer).__name__} stepped outside of a training batch; the step counts, but modifiers are "
                f"not told: step it in training_step, so that they can act on it"
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._close_batch()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close_batch()  # still open when on_train_batch_start of the LightningModule returned -1

    def _restore_random(self) -> None:
        if self._random is not None:
            random_state.restore(self._random)
            self._random = None

    def _show_hooks(self, pl_module: LightningModule | None) -> None:
        """Compiled code does not see hooks that came, or went, later: compile it anew."""
        hooked = [module for modifier in self.lifecycle.modifiers for module in modifier.hooked]
        if hooked != self._hooked and pl_module is not None and is_compiled(pl_module):
            torch.compiler.reset()
        self._hooked = hooked

    def _close_batch(self) -> None:
        if not self._in_batch:
            return
        if self._acting:
            self.lifecycle.emit(self._batch_state, self.clock.event(E.BATCH_END))
            self._show_hooks(self._root)
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
        for keeping in trainer.checkpoint_callbacks:
            keeping.on_train_end(trainer, pl_module)  # what it saves now is the last of training: not compressed
        self._finish(trainer, pl_module, trained=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.done:
            rank_zero_info("nothing was left to train; compressing the model as it is")
            self._restore_random()
            pl_module.to(trainer.strategy.root_device)  # the strategy has put it back on the CPU
            for averaging in (c for c in trainer.callbacks if self.clock.global_step and averages(c)):
                averaging.on_train_end(trainer, pl_module)  # its average becomes the model, as in training
            self._finish(trainer, pl_module, trained=False)
            pl_module.cpu()

    def _finish(self, trainer: Trainer, pl_module: LightningModule, *, trained: bool) -> None:
        self.clock.detach()
        self._check_module(pl_module)
        if self._take_earlier_end(trainer, pl_module):
            return
        event = self.clock.event()
        end = self._ending(trainer, pl_module, self.lifecycle, event)
        save_first = trained and not trainer.fast_dev_run
        with requeue_only(trainer, save_first=save_first), stopped_by_sigterm(trainer):
            end.compress()
            self.done = True  # before compressed.ckpt is saved: who resumes from it is done
            end.leave()
            if self._outputs is not None:
                supersede(trainer, self._outputs.checkpoint)

    def _take_earlier_end(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """A run that had come to its end before is resumed where its training ended: nothing is made twice."""
        if self._trained or self._outputs is None:
            return False
        read = earlier_end(self._outputs, self.state_key, self.state_dict())
        if read is None:
            return False
        path = self._outputs.checkpoint
        pl_module.on_load_checkpoint(read)
        pl_module.load_state_dict(read["state_dict"], strict=pl_module.strict_loading)
        self.load_state_dict(read["callbacks"][self.state_key])
        if isinstance(trainer.checkpoint_callback, ModelCheckpoint):
            trainer.checkpoint_callback.best_model_path = str(path)
        rank_zero_info(
            f"this run was compressed and exported before, into {self._outputs.export}: the model is that "
            f"of {path} now, and nothing is exported again (delete that file to have it done anew)"
        )
        return True

    def _ending(self, trainer: Trainer, pl_module: LightningModule, lifecycle: Lifecycle, event: Event) -> Finish:
        run = (self.options, self.recipe, event, self._saved_files, self._outputs, self._run)
        done = (self.clock.state_dict(), self._own_batches, self._seconds, self._facts)
        return Finish(trainer, pl_module, lifecycle, self._state, *run, *done)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._root is None and not self.done and not self._knows_checkpoint:
            rank_zero_warn(
                "CompressionCallback has compressed nothing: it acts at the end of trainer.fit, which was not called "
                "(perhaps because of train=False), and no checkpoint of a run with it was loaded; to compress a model "
                "as it is, fit with Trainer(max_epochs=0), on the command line trainer.max_epochs=0"
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._forget_batch()
        self.lifecycle.abort()
        self._take_off()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._take_off()

    def _take_off(self) -> None:
        self.clock.detach()
        self._lock.release()
        self._patches.close()

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
            "run": self._run,
            "facts": {name: self._facts[name] for name in EARLIER_FACTS if name in self._facts},
        }
        check_plain(state, "CompressionCallback.state_dict()")
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave; only fit resumes, validate and test load weights alone.

        Raises:
            ValueError: The checkpoint was written with another recipe, and ``allow_recipe_change`` is not set; or its
                state is not one that this version writes.
        """
        self._knows_checkpoint = True
        try:
            self._load_state_dict(state_dict)
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise ValueError(
                f"the checkpoint holds a state of CompressionCallback that cannot be read "
                f"({type(error).__name__}: {error}): it is damaged, or another version of lightning-compress wrote it; "
                f"resume with that version, or load the weights alone and train from step 0"
            ) from error

    def _load_state_dict(self, state_dict: dict[str, Any]) -> None:
        receiver, self._receiver = self._receiver, None
        if self._stage not in (None, "fit"):
            if self.lifecycle.initialized and not self.lifecycle.finalized:  # cut short, now tested
                self.lifecycle.weights_loaded(state_dict["modifiers"])
            elif not self.done and receiver is not None:
                self._say_what_is_missing(state_dict, receiver)
            return
        changes = recipe_difference(state_dict["recipe"], self.recipe)
        if changes and not self.options.allow_recipe_change:
            raise ValueError(
                "the recipe differs from that of the checkpoint:\n  " + "\n  ".join(changes) + "\n"
                "resume with the recipe of the first run, or set allow_recipe_change=True"
            )
        states = dict(state_dict["modifiers"].items())
        for key, modifier in zip(self.lifecycle.keys(), self.lifecycle.modifiers, strict=True):
            if key in states:
                modifier.load_state_dict(states[key])
        self.clock.load_state_dict(state_dict["clock"])
        self.ledger.load_state_dict(state_dict["ledger"])
        self.done = state_dict["done"]
        self._random, self._resumed = state_dict.get("random"), True
        self._run = state_dict.get("run", self._run)
        self._facts |= state_dict.get("facts", {})
        self._dense_is_known = any(state["started"] for state in states.values())
        if self.done:
            self.lifecycle.abort()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Lightning calls this right before :meth:`load_state_dict`."""
        self._receiver = pl_module

    def _say_what_is_missing(self, state: dict[str, Any], module: LightningModule) -> None:
        """What a model lacks that gets its weights in a new process, to be validated or tested."""
        if not state["done"]:
            states = zip(self.lifecycle.modifiers, map(state["modifiers"].get, self.lifecycle.keys()), strict=True)
            if begun := [m.name for m, then in states if m.needs.checkpoint_state and then and then["started"]]:
                rank_zero_warn(
                    f"this checkpoint is of a run that has not compressed its model yet: what runs now are its dense "
                    f"weights, without what {' and '.join(begun)} makes of them; resume the run with trainer.fit, or "
                    f"take its compressed.ckpt"
                )
        beside = state.get("facts", {}).get("beside_weights", ())
        if beside and not Quantized.find(module):
            rank_zero_warn(
                f"this checkpoint holds the compressed weights, but not {', nor '.join(beside)}: the model runs "
                f"without; to have all, take load(folder, model) of the exported folder, and give no ckpt_path"
            )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the random states of all ranks, and undo weight averaging where the model is compressed.

        Averaging puts the average of dense weights into every checkpoint, compressed.ckpt too.
        """
        own = checkpoint["callbacks"][self.state_key]
        own["random"] = random_state.collect_all(own["random"][0])
        if self._state.model is not None:
            write_shapes(checkpoint, self._state.model)  # after teardown, the module's own hook is off
        write_plain_modules(checkpoint)
        if self.done and checkpoint.pop("averaging_state", None) is not None:
            checkpoint["state_dict"] = checkpoint.pop("current_model_state")

    # -- checks -------------------------------------------------------------------------------------------------------

    def _check_module(self, pl_module: LightningModule) -> None:
        name, module = choose(pl_module, self.options.module)
        if module is not self._state.model:
            raise ValueError(
                f"the module {name!r} is another object than the one that the modifiers were initialized on: it was "
                f"replaced after configure_model; build it in __init__, setup or configure_model"
            )
