"""What quantization would cost now: measured at each validation of a run, on a model that does not change.

Weights are rounded to nearest in place, measured on a few validation batches, and written back from a copy on the CPU:
so every use of a weight counts, also in modules that are compiled, or that are used without being called. Other ways
would not: hooks do not see such modules, and round again for each batch.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_compress.calibration.options import check_whole_number
from lightning_compress.layers.matching import Names, listed
from lightning_compress.layers.matrix import parameter_of
from lightning_compress.layers.split_experts import split_while
from lightning_compress.quant.schemes import GroupSize
from lightning_compress.quant.trial_rounding import Assigned, assigned, round_in_place, weight_scheme
from lightning_compress.quant.weight_metrics import sqnr_db
from lightning_compress.training.best_weights import monitored_metric
from lightning_compress.training.evaluation import Measurement, compare
from lightning_compress.training.loaders import validation_loaders
from lightning_compress.training.measurement import measured, summing_device
from lightning_compress.training.random_state import undisturbed
from lightning_compress.training.sharding import shards
from lightning_compress.training.submodule import choose

__all__ = ["QuantizationProbe"]


class QuantizationProbe(Callback):
    """Log at each validation what rounding the weights would cost now; training goes on bit for bit as without it.

    Scalars, to all loggers and to ``trainer.callback_metrics`` (so that ``ModelCheckpoint`` can follow them)::

        probe/W4A16/val/loss_increase          rounded minus dense, for each metric that validation logs
        probe/W4A16/nll_increase_error         its standard error, of language models, which have nll and perplexity
        probe/W4A16/sqnr_db                    signal to quantization noise of the weights: the median over modules
        probe/W4A16/sqnr_db_lowest             that of the worst module
        probe/W4A16/sqnr_db/NAME               that of each module; only where validation measures nothing

    Args:
        schemes: Presets of weights (``W4A16``); inputs stay as they are.
        targets: Class names, dotted names or ``re:`` patterns of the modules that are rounded.
        ignore: Those that are left out.
        group_size: As for quantizers.
        scale_search: ``minmax`` or ``mse``.
        batches: Batches of each validation loader to measure on.
        every_n_validations: The first validation and every n-th after it are probed.
        module: The model inside the LightningModule, as for CompressionCallback.

    Raises:
        ValueError: An argument is wrong; at the beginning of a fit also where a scheme does not fit the model.
    """

    def __init__(
        self,
        schemes: Sequence[str] = ("W8A16", "W4A16", "W3A16"),
        *,
        targets: Names = "Linear",
        ignore: Names | None = None,
        group_size: GroupSize = "auto",
        scale_search: Literal["minmax", "mse"] = "minmax",
        batches: int = 8,
        every_n_validations: int = 1,
        module: str | None = None,
    ):
        self.targets, self.ignore, self.module = listed(targets), listed(ignore or []), module
        self.scale_search, self.batches, self.every_n_validations = scale_search, batches, every_n_validations
        names = [schemes] if isinstance(schemes, str) else list(schemes)
        self.schemes = {name: weight_scheme(name, self.targets, group_size) for name in names}
        if not names:
            raise ValueError("schemes is empty, expected names of presets such as ['W8A16', 'W4A16']")
        if scale_search not in ("minmax", "mse"):
            raise ValueError(f"scale_search={scale_search!r}: expected 'minmax' or 'mse'; a probe has no other data")
        for name in ("batches", "every_n_validations"):
            check_whole_number(name, getattr(self, name))
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1")
        self._validations = 0

    @property
    def state_key(self) -> str:
        """Several probes may stand in one Trainer."""
        return self._generate_state_key(schemes=list(self.schemes), module=self.module, targets=self.targets)

    def state_dict(self) -> dict[str, Any]:
        """How many validations there were."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self._validations = state_dict["validations"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """ValueError where the schemes do not fit the model, or the strategy shards its weights."""
        if shards(trainer) or isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
            raise ValueError(
                f"QuantizationProbe rounds whole weights, and {type(trainer.strategy).__name__} shards them; leave it "
                f"out, or train with strategy='ddp' or on one device"
            )
        _, model = choose(pl_module, self.module)
        with split_while(model):
            for scheme in self.schemes.values():
                assigned(model, scheme, self.ignore)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Probe, except in the sanity check and outside of fit; every rank does."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        due = self._validations % self.every_n_validations == 0
        self._validations += 1
        if not due:
            return
        _, model = choose(pl_module, self.module)
        with undisturbed(trainer, 0), _attributes_kept(pl_module), split_while(model):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # on_fit_start has warned
                    plans = {name: assigned(model, s, self.ignore) for name, s in self.schemes.items()}
            except ValueError as error:  # weights that are NaN by now, or were cut
                rank_zero_warn(f"this validation is not probed: {error}")
                return
            scalars = self._probe(trainer, pl_module, model, plans)
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=trainer.global_step)
        trainer.callback_metrics.update(
            {n: torch.tensor(v, dtype=torch.float64, device="cpu") for n, v in scalars.items()}
        )

    def _probe(
        self, trainer: Trainer, pl_module: LightningModule, model: nn.Module, plans: dict[str, Assigned]
    ) -> dict[str, float]:
        """The scalars; ``plans`` has the scheme of each module, by scheme."""
        measure = partial(self._measure, trainer, pl_module, model)
        dense, texts = measure(), list[str]()
        scalars: dict[str, float] = {}
        modules = {
            name: model.get_submodule(name) for name in dict.fromkeys(n for plan in plans.values() for n in plan)
        }
        with _restored([parameter_of(module) for module in modules.values()]) as restore:
            for title, plan in plans.items():
                restore()
                errors = {
                    name: round_in_place(modules[name], scheme, self.scale_search) for name, scheme in plan.items()
                }
                prefix = f"probe/{title}"
                scalars |= _noise(prefix, errors, each=not dense.values)
                if not dense.values:
                    continue
                change = compare(dense, measure(), summing_device(trainer))["metric"]
                for name, entry in change.items():
                    scalars[f"{prefix}/{name}_increase"] = entry["difference"]
                    if entry["standard_error"] is not None:
                        scalars[f"{prefix}/{name}_increase_error"] = entry["standard_error"]
                first, entry = next(iter(change.items()))
                texts.append(f"{title} {entry['difference']:+.4g}")
        if texts:
            rank_zero_info(f"rounded at step {trainer.global_step}, {first} would change by: {', '.join(texts)}")
        return scalars

    def _measure(self, trainer: Trainer, pl_module: LightningModule, model: nn.Module) -> Measurement:
        loaders, limits = validation_loaders(trainer, pl_module, self.batches)
        return measured(trainer, pl_module, model, loaders, limits, monitored_metric(trainer))


def _noise(prefix: str, errors: dict[str, float], each: bool) -> dict[str, float]:
    """SQNR of the modules in dB; those without an error have none."""
    noise = {name: db for name, error in errors.items() if (db := sqnr_db(error)) is not None}
    if not noise:
        return {}
    scalars = {f"{prefix}/sqnr_db": median(noise.values()), f"{prefix}/sqnr_db_lowest": min(noise.values())}
    return scalars | ({f"{prefix}/sqnr_db/{name}": db for name, db in noise.items()} if each else {})


@dataclass(frozen=True)
class _Copies:
    """Copies of tensors on the CPU; called, they are written back."""

    tensors: list[tuple[Tensor, Tensor]]

    def __call__(self) -> None:
        for tensor, saved in self.tensors:
            tensor.copy_(saved)


@contextmanager
def _restored(parameters: Sequence[Tensor]) -> Iterator[_Copies]:
    """Afterwards the tensors are as before, bit for bit, whatever ends the block; autograd sees no change."""
    distinct = {id(parameter): parameter.data for parameter in parameters}.values()
    copies = _Copies([(data, data.to("cpu", copy=True)) for data in distinct])
    try:
        yield copies
    finally:
        try:
            copies()
        except BaseException:  # the handler of a signal
            copies()
            raise


@contextmanager
def _attributes_kept(root: LightningModule) -> Iterator[None]:
    """Attributes that the user's validation may change, such as lists of outputs, and buffers, are as before."""
    internal = vars(LightningModule()).keys()
    attributes = {n: (v, copy(v)) for n, v in vars(root).items() if n not in internal and _is_plain(v)}
    with ExitStack() as stack:
        stack.enter_context(_restored(list(root.buffers())))
        try:
            yield
        finally:
            for name, (value, content) in attributes.items():
                if isinstance(value, list):
                    value[:] = content
                elif isinstance(value, dict | set):
                    value.clear()
                    value.update(content)
                vars(root)[name] = value


def _is_plain(value: Any) -> bool:
    return isinstance(value, list | dict | set | int | float | str | tuple | None)
