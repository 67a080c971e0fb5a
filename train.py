"""Trains, compresses and tests a model by a Hydra config:  python train.py +compress=gptq_w4

Compression is an ordinary callback: ``+compress=NAME`` adds it to ``callbacks``.
"""

import logging
import os
import warnings
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

log = logging.getLogger(__name__)

# here, and not in train(): processes of ddp_spawn read this file anew
warnings.filterwarnings("ignore", ".*does not have many workers.*")  # tokens are in memory: workers would be slower
warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated.*")  # Lightning 2.6 under torch 2.13


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float | None:
    """Run the app; returns the metric ``optimized_metric`` for a sweeper."""
    try:
        metrics = train(cfg)
    except SystemExit as stopped:
        if stopped.code == 0:  # the end of a plan: a sweep goes on with the next job
            return None
        raise SystemExit(stopped.code or 143) from stopped  # SIGTERM: Lightning would exit as after success
    except Exception:
        if HydraConfig.get().mode == RunMode.MULTIRUN:  # Hydra prints the error of the first job that failed only
            log.exception("this job failed")
        raise
    return optimized(metrics, cfg.optimized_metric)


def train(cfg: DictConfig) -> dict[str, float]:
    """Train, compress and test.

    Args:
        cfg: Config with the fields of conf/train.yaml.

    Returns:
        The metrics of training and test by name.

    Raises:
        ValueError: ``compress`` is a bare string, or there is nothing to do.
    """
    # On a busy machine threads that wait by spinning are slow: with 2 threads on 2 cores under load 6 the demo made
    # 0.27 steps per second, and 3.1 with threads that sleep. OpenMP reads this when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    import lightning  # not above, so that --help, --cfg job and tab completion take 1 s instead of 6
    import torch
    from lightning.pytorch.callbacks import Callback
    from lightning.pytorch.loggers import Logger
    from lightning.pytorch.utilities import rank_zero_only

    from lightning_compress import CompressionCallback
    from lightning_compress.training.slurm import check_tasks

    check_compress(cfg)
    if cfg.compress_plan:
        plan_only(cfg)
    logging.getLogger("lightning").handlers.clear()  # Hydra's logging shows its messages: else each appears twice
    if rank_zero_only.rank:
        log.setLevel(logging.WARNING)  # other ranks would say each line again, through the progress bar of rank zero
    if cfg.seed is not None:
        lightning.seed_everything(cfg.seed, workers=True, verbose=False)
    if OmegaConf.select(cfg, "callbacks.compress.stream"):
        return stream(cfg)

    callbacks = instantiate_each(cfg.get("callbacks"), Callback)  # first: errors in a recipe show before data is read
    compresses = any(isinstance(callback, CompressionCallback) for callback in callbacks)
    if not (cfg.train or cfg.test or compresses):
        raise ValueError("nothing to do: train=false, test=false, and no +compress=NAME; set one of them")
    log.info("data: %s", cfg.data._target_)
    data = hydra.utils.instantiate(cfg.data)
    log.info("model: %s", cfg.model._target_)
    model = hydra.utils.instantiate(cfg.model)
    log.info("%.2f million parameters", sum(p.numel() for p in model.parameters()) / 1e6)
    loggers = instantiate_each(cfg.get("logger"), Logger)

    # Without training, fit runs no epoch: it only sets up, and the callback compresses the initial weights.
    trainer: lightning.Trainer = hydra.utils.instantiate(
        cfg.trainer, callbacks=callbacks, logger=loggers, **({} if cfg.train else {"max_epochs": 0})
    )
    check_tasks(trainer.world_size, os.environ)
    for logger in trainer.loggers:
        logger.log_hyperparams(flat(cfg))

    ckpt_path = cfg.ckpt_path
    if not cfg.train and ckpt_path:
        log.info("weights: %s", ckpt_path)
        model.load_state_dict(torch.load(ckpt_path, map_location="cpu", weights_only=True)["state_dict"])
        ckpt_path = None
    if ckpt_path is None and "SUBMITIT_EXECUTOR" in os.environ and list(Path(cfg.paths.output_dir).glob("hpc_ckpt_*")):
        ckpt_path = "hpc"  # submitit has restarted this run; under Slurm, Lightning finds the checkpoint itself
    metrics: dict[str, Any] = {}
    if cfg.train or compresses:
        log.info("training%s", " and compression" if compresses else "") if cfg.train else log.info("compression")
        trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
        metrics |= trainer.callback_metrics
    if cfg.test:
        best = getattr(trainer.checkpoint_callback, "best_model_path", "") or None
        log.info("test of %s", best or "the model as it is")
        trainer.test(model, datamodule=data, ckpt_path=best)
        metrics |= trainer.callback_metrics
    log.info("this run's folder: %s", cfg.paths.output_dir)
    return {name: float(value) for name, value in metrics.items()}


def stream(cfg: DictConfig) -> dict[str, float]:
    """Compress a model that is larger than memory, from folder to folder: ``callbacks.compress.stream=true``.

    Nothing is trained, measured or tested. The run's folder gets ``compressed`` and ``report``; a run that was killed
    goes on in the same folder.

    Raises:
        ValueError: The config trains, its model is not a folder, or its strategy is not one of processes.
    """
    import lightning
    from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

    from lightning_compress.training.slurm import check_tasks

    if cfg.train or not os.path.isdir(str(cfg.model.get("path"))):
        raise ValueError(
            f"callbacks.compress.stream=true compresses the model of a folder without training: expected "
            f"model=hf model.path=FOLDER train=false, got model.path={cfg.model.get('path')} train={cfg.train}"
        )
    trainer: lightning.Trainer = hydra.utils.instantiate(cfg.trainer, logger=False)
    check_tasks(trainer.world_size, os.environ)
    strategy, launcher = trainer.strategy, trainer.strategy.launcher
    is_ddp = isinstance(strategy, DDPStrategy) and strategy._start_method == "popen"
    if not (is_ddp or isinstance(strategy, SingleDeviceStrategy)):
        raise ValueError(
            f"callbacks.compress.stream=true works on one device, or with trainer.strategy=ddp, and got "
            f"trainer.strategy={cfg.trainer.get('strategy')}"
        )
    return launcher.launch(stream_on_ranks, cfg, strategy) if launcher else stream_on_ranks(cfg, strategy)


def stream_on_ranks(cfg: DictConfig, strategy: Any) -> dict[str, float]:
    """The work of each process of :func:`stream`; rank 0 writes the report."""
    import torch

    from lightning_compress import compress_folder
    from lightning_compress.report import summary, table
    from lightning_compress.team import Team

    strategy.setup_environment()
    recipe = {key: value for key, value in cfg.callbacks.compress.items() if key != "stream"}
    callback = hydra.utils.instantiate(recipe)
    modifiers, options = callback.lifecycle.modifiers, callback.options
    if options.gates:
        raise ValueError("gate and stream=true exclude each other: a model that is streamed is not measured")
    batches = None
    if any(modifier.needs.data for modifier in modifiers):
        data = hydra.utils.instantiate(cfg.data)
        data.prepare_data()
        data.setup("fit")
        batches = islice(data.calibration_dataloader(), options.calibration_batches)
    folder = options.export_dir or os.path.join(cfg.paths.output_dir, "compressed")
    device, team = strategy.root_device, Team.of_processes()
    ledger = compress_folder(
        cfg.model.path, folder, modifiers, batches, resume=options.resume, team=team,
        options=replace(options.calibration, device=None if device.type == "cpu" else device),
        dtype=None if cfg.model.dtype == "auto" else getattr(torch, cfg.model.dtype),
    )  # fmt: skip
    if team.rank == 0:
        facts = {"recipe": options.recipe_name, "export_dir": str(folder), "seed": options.calibration.seed}
        summary.write(os.path.join(cfg.paths.output_dir, "report"), ledger, facts)
        table.show(ledger, facts)
    team.close()
    return {}


def check_compress(cfg: DictConfig) -> None:
    """Refuse ``+compress=NAME`` without such a recipe: Hydra sets a plain string, and nothing would be compressed.

    Raises:
        ValueError: ``compress`` is a string, not the callback that a recipe adds to ``callbacks``.
    """
    name = cfg.get("compress")
    if isinstance(name, str):
        raise ValueError(
            f"+compress={name} set a plain string, because Hydra does not see the recipes of lightning_compress: "
            f"expected a callback at callbacks.compress. Install the package into this environment "
            f"(pip install lightning-compress); 'python train.py --info searchpath' then lists lightning-compress"
        )


def plan_only(cfg: DictConfig) -> None:
    """``compress_plan=true``: the callback prints its plan, and nothing else happens.

    Raises:
        ValueError: There is no recipe, or the model is not built in memory.
    """
    if OmegaConf.select(cfg, "callbacks.compress") is None:
        raise ValueError("compress_plan=true plans a compression: expected +compress=NAME")
    if OmegaConf.select(cfg, "callbacks.compress.stream"):
        raise ValueError(
            f"compress_plan=true plans for a model in memory, and callbacks.compress.stream=true reads it from its "
            f"folder: lightning-compress plan {cfg.model.get('path')} RECIPE"
        )
    OmegaConf.update(cfg, "callbacks.compress.plan", True, force_add=True)


def instantiate_each(configs: DictConfig | None, kind: type) -> list[Any]:
    """Build every entry that has a ``_target_``, as the lightning-hydra-template does.

    Raises:
        ValueError: An entry is not a ``kind``.
    """
    built = []
    for name, config in (configs or {}).items():
        if isinstance(config, DictConfig) and "_target_" in config:
            log.info("%s: %s", name, config._target_)
            entry = hydra.utils.instantiate(config)
            if not isinstance(entry, kind):
                raise ValueError(f"{name!s}: expected a {kind.__name__}, {config._target_} is a {type(entry).__name__}")
            built.append(entry)
    return built


def optimized(metrics: dict[str, float], name: str | None) -> float | None:
    """The metric for a sweeper; None if ``name`` is None.

    Raises:
        ValueError: The run has no such metric.
    """
    if name is None:
        return None
    if name not in metrics:
        raise ValueError(f"optimized_metric={name} is none of this run's metrics: {', '.join(sorted(metrics))}")
    return metrics[name]


def flat(cfg: DictConfig) -> dict[str, Any]:
    """The config for loggers: resolved, without folders."""
    resolved: Any = OmegaConf.to_container(cfg, resolve=True)
    return {key: value for key, value in resolved.items() if key != "paths"}


if __name__ == "__main__":
    main()
