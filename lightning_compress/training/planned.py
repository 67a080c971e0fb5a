"""The plan of a Trainer's run, before anything is set up: printed, and written to ``report/plan.json``."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_compress.core.modifier import Modifier
from lightning_compress.files.atomic_file import whole_file
from lightning_compress.planning.make import make_plan
from lightning_compress.planning.plan import Plan
from lightning_compress.training.checks import TRUE_DTYPES
from lightning_compress.training.loaders import first_calibration_batch, forward_of
from lightning_compress.training.outputs import Outputs
from lightning_compress.training.results import processors
from lightning_compress.training.run import Run

__all__ = ["plan_run"]


def plan_run(
    trainer: Trainer, pl_module: LightningModule, model: nn.Module, modifiers: Sequence[Modifier], run: Run
) -> None:
    """Plan what is about to begin, on rank 0.

    With ``plan="compare"`` the run goes on, and its report shows the plan beside the facts; with ``plan=True`` it ends
    here.

    Raises:
        SystemExit: ``plan=True``: code 0; 1 where set-up would refuse the run.
    """
    if not run.options.plan:
        return
    plan = run.team.result(lambda: _plan(trainer, pl_module, model, modifiers, run), "the plan")
    run.facts["plan"] = plan.to_json()
    if run.options.plan is True:
        raise SystemExit(int(bool(plan.refusals)))


def _plan(
    trainer: Trainer, pl_module: LightningModule, model: nn.Module, modifiers: Sequence[Modifier], run: Run
) -> Plan:
    options = run.options
    needs_data = any(modifier.needs.data for modifier in modifiers)
    batch, batches = None, 0
    if needs_data:
        batch, batches = first_calibration_batch(trainer, pl_module, options, run.own_batches)
    dtype = TRUE_DTYPES.get(trainer.precision)
    plan = make_plan(
        model if dtype is None else copy.deepcopy(model).to(dtype),  # the Trainer converts it later
        modifiers,
        batch,
        batches,
        options.calibration,
        forward=forward_of(pl_module, [batch]) if needs_data else None,
        processors=processors(trainer, pl_module),
        eval_batches=_eval_batches(trainer, options.eval_batches) if options.evaluate else 0,
    )
    plan.show()
    if not trainer.fast_dev_run:
        _write(Outputs.of(trainer, options.export_dir).report, plan)
    return plan


def _write(folder: Path, plan: Plan) -> None:
    """Write ``plan.json``."""
    with whole_file(folder / "plan.json") as path:
        path.write_text(json.dumps(plan.to_json(), indent=2) + "\n", encoding="utf-8")


def _eval_batches(trainer: Trainer, limit: int | None) -> int:
    """How many batches the model is measured on; 0 where the loaders do not tell."""
    source = trainer.fit_loop.epoch_loop.val_loop._data_source
    loaders: Any = source.dataloader() if source.is_defined() else None
    listed = list(loaders) if isinstance(loaders, list | tuple) else [loaders]
    sizes = [sized_len(loader) if loader is not None else None for loader in listed]
    share = trainer.limit_val_batches
    count = 0
    for size in sizes:
        known = size or 0
        known = int(known * share) if isinstance(share, float) else min(known, share or 0)
        count += known if limit is None else min(known, limit)
    return count
