"""Runs of train.py and of the template app on one process and on two ranks, started in each of Lightning's ways.

    one             one process
    ddp             two ranks that were started from outside, as by torchrun or SLURM
    ddp_spawn       two ranks that get Trainer, model and data pickled
    ddp_notebook    two ranks that are forked from this process
    shares          as ddp, each rank on its own share of the data

Except in ``shares`` both ranks train on the same batches: the mean of two equal gradients is that gradient bit for bit,
so that the weights must be those of one process.
"""

import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from omegaconf import open_dict
from torch import multiprocessing as torch_multiprocessing
from torch.utils.data import DataLoader

import lightning_compress as lc
import train
from lightning_compress import CompressionCallback
from tests.support.template_app import DenseNet, DigitsData, DigitsModule
from tests.support.template_reader import fixed_batch
from tests.support.training_runs import quiet
from tests.support.two_ranks import run_two_ranks

ROOT = Path(__file__).resolve().parents[2]
STRATEGIES = ("one", "ddp", "ddp_spawn", "ddp_notebook", "shares")
VOCABULARY = 256

C = "callbacks.compress.modifiers"
TRAIN_PY: dict[str, list[str]] = {
    "rtn_w4": ["+compress=rtn_w4"],
    "gptq_w4": ["+compress=gptq_w4"],
    "gptq_w8a8": ["+compress=gptq_w8a8"],
    "awq_w4": ["+compress=awq_w4", f"{C}.awq.n_grid=3"],
    "smoothquant_gptq_w8a8": ["+compress=[smoothquant,gptq_w8a8]"],
    "gptq_w3_tune": ["+compress=[gptq_w3,tune]", f"{C}.tune.epochs=1", f"{C}.gptq.objective=loss"],
    "gptq_w3_training_step": ["+compress=gptq_w3", f"{C}.gptq.objective=training_step"],
    "autoround_w4": ["+compress=autoround_w4", f"{C}.autoround.iters=3"],
    "sparsegpt_50": ["+compress=sparsegpt_50"],
    "wanda_owl": ["+compress=wanda_50", f"{C}.wanda.sparsity_profile=owl"],
    "wanda_2of4_refined": ["+compress=wanda_2of4_refined", f"{C}.wanda.regional_steps=2"],
    "prune_2of4": ["+compress=prune_2of4"],
    "movement_50": ["+compress=movement_50"],
    "qat_w4": ["+compress=qat_w4"],
    "qat_w8a8_static": ["+compress=qat_w8a8_static"],
    "qat_from_gptq": ["+compress=qat_w3_from_gptq"],
    "qat_from_gptq_midway": [
        "+compress=qat_w3_from_gptq",
        *(f"{C}.{modifier}.{key}" for modifier in ("gptq", "qat") for key in ("start=0.5", "unit=fraction")),
    ],
    "distill": ["+compress=distill"],
    "structured_25": ["+compress=structured_25"],
    "depth_1": ["+compress=depth_1", f"{C}.depth.start=null"],
    "learned_2of4": ["+compress=learned_2of4"],
    "kv_fp8": ["+compress=[gptq_w4,kv_fp8]"],
    "rotate": ["+compress=[rotate,gptq_w4]"],
    "nvfp4": ["+compress=nvfp4"],
    "stack_qat": ["+compress=[distill,magnitude_cubic,qat_w4]"],
    "stack_structured": ["+compress=[distill,structured_25,gptq_w4]"],
}  # fmt: skip

INT4 = {"scheme": "W4A16", "group_size": 16}
TEMPLATE: dict[str, Callable[[], list[lc.Modifier]]] = {
    "round": lambda: [lc.QuantizationModifier(**INT4)],
    "w8a8": lambda: [lc.QuantizationModifier(scheme="W8A8")],
    "gptq": lambda: [lc.GPTQModifier(**INT4)],
    "wanda": lambda: [lc.WandaPruningModifier(sparsity=0.5)],
    "magnitude": lambda: [lc.MagnitudePruningModifier(start=0, end=4, update=1)],
    "movement": lambda: [lc.MovementPruningModifier(start=0, end=4, final_sparsity=0.5)],
    "learned_mask": lambda: [lc.LearnedMaskModifier(start=0, end=6, ignore=["re:.*6"])],
    "qat": lambda: [lc.QATModifier(**INT4, start=1)],
    "qat_w8a8": lambda: [lc.QATModifier(scheme="W8A8", start=1)],
    "distill": lambda: [lc.DistillationModifier(hidden={"model.2": "model.2"}), lc.QATModifier(**INT4)],
    "structured": lambda: [
        lc.StructuredPruningModifier(dimension="channels", ratio=0.5, start=0, input_shape=[1, 8, 8], round_to=16),
        lc.GPTQModifier(**INT4),
    ],
}  # fmt: skip

SMALL = [
    "trainer=cpu", "trainer.max_epochs=2", "logger=none", "~callbacks.progress_bar",
    "+trainer.enable_progress_bar=false", "+trainer.enable_model_summary=false",
    "model.hidden_size=64", "model.intermediate_size=64", "model.num_layers=2",
    "data.block_length=16", "data.batch_size=4", "data.train_blocks=16", "data.val_blocks=8", "data.test_blocks=8",
    "data.calibration_blocks=16", "+callbacks.compress.verify=false",
    "+callbacks.witness._target_=tests.support.strategy_runs.Witness",
]  # fmt: skip


def fixed_ids() -> torch.Tensor:
    return torch.arange(2 * 16).view(2, 16) * 7 % VOCABULARY


class Witness(Callback):
    """Each rank writes down its weights, and what its model answers to a fixed batch."""

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        batch = fixed_batch() if isinstance(pl_module, DigitsModule) else fixed_ids()
        pl_module.eval()
        with torch.no_grad():
            answer = pl_module(batch)
        state = {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}
        torch.save({"state": state, "answer": answer}, f"{trainer.default_root_dir}/rank{trainer.global_rank}.pt")


class InOrder(DigitsData):
    """Its batches do not depend on how many random numbers a process has drawn."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.parts[0], self.hparams.batch_size)


def options(strategy: str) -> dict[str, Any]:
    """Arguments of the Trainer."""
    if strategy == "one":
        return {"strategy": "auto", "devices": 1}
    kind = "ddp" if strategy == "shares" else strategy
    return {"strategy": kind, "devices": 2, "use_distributed_sampler": strategy == "shares"}


def run(app: str, kind: str, strategy: str, folder: Path, library: Path, precision: str = "32-true") -> None:
    """One run, in ``folder``; RuntimeError with the traceback where it fails."""
    folder.mkdir()
    start = partial(run_train_py, library) if app == "train.py" else run_template
    work = partial(_quietly, start, kind, options(strategy) | {"precision": precision}, folder)
    if strategy in ("ddp", "shares"):
        failed = [text for text in run_two_ranks(lambda rank: work(), folder, seconds=120) if text]
        if failed:
            raise RuntimeError("\n".join(failed))
    else:
        with spawned_from_a_server():
            work()


def _quietly(start: Callable[..., None], *arguments: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start(*arguments)


def run_train_py(library: Path, kind: str, arguments: dict[str, Any], folder: Path) -> None:
    trainer = [f"++trainer.{name}={value}" for name, value in arguments.items()]
    overrides = [*SMALL, *TRAIN_PY[kind], *trainer, f"+data.folder={library}"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", overrides, return_hydra_config=True)
    with open_dict(cfg):
        cfg.paths.update(work_dir=str(folder), output_dir=str(folder))
        del cfg["hydra"]
    train.train(cfg)


def run_template(kind: str, arguments: dict[str, Any], folder: Path) -> None:
    lightning.seed_everything(0, verbose=False)
    module, data = DigitsModule(DenseNet()), InOrder()
    kept = ModelCheckpoint(folder, filename="best", monitor="val/acc", mode="max", save_last=True)
    callback = CompressionCallback(TEMPLATE[kind](), calibration_batches=2)
    trainer = quiet(folder, callback, kept, Witness(), max_epochs=2, **arguments)
    trainer.fit(module, data)
    trainer.test(module, data, ckpt_path="best", weights_only=False, verbose=False)


@contextmanager
def spawned_from_a_server() -> Iterator[None]:
    """Processes that are spawned come from a server that has imported this file: else each imports for 10 seconds."""
    start = torch_multiprocessing.start_processes

    def start_processes(*args: Any, start_method: str, **kwargs: Any) -> Any:
        return start(*args, start_method="forkserver" if start_method == "spawn" else start_method, **kwargs)

    multiprocessing.set_forkserver_preload([__name__])
    torch_multiprocessing.start_processes = start_processes
    environment = dict(os.environ)
    try:
        yield
    finally:
        torch_multiprocessing.start_processes = start
        for name in set(os.environ) - set(environment):
            del os.environ[name]
        os.environ.update(environment)
