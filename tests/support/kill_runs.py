"""Runs that can be killed: a process that imports torch and Lightning once, and forks a run whenever it is told to.

    python -m tests.support.kill_runs
    > {"case": "magnitude", "folder": "/somewhere", "kill": ["batch", 3]}       a line of JSON per run, on stdin
    < {"killed": true, "failed": null}                                          the answer, on stdout

A child that comes to the moment in ``kill`` says so through a pipe and stands still there; then the parent ends it with
SIGKILL. Every run begins with ``ckpt_path="last"``, and every one that resumes has another random seed.

    batch N       at the start of the batch after step N
    backward N    gradients of the batch after step N are there
    writing N     half of the checkpoint of step N is in the file
    finish        training has ended, nothing is compressed
    calibration   in the middle of the walk
    solved N      group N of the walk is finished, and not in the log
    stored N      group N of the walk is in the log
    trained N     N epochs after the walk are over, and N - 1 of them in the log
    tuned N       N epochs after the walk are in the log
    export        all exported files are written, under their provisional name
    promote       half of compressed.ckpt is in the file
"""

import json
import os
import random
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fsspec.implementations.local import LocalFileOpener
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn

import lightning_compress
from lightning_compress import CompressionCallback, Modifier
from lightning_compress.files import atomic_folder as atomic
from lightning_compress.modifiers import magnitude, qat  # noqa: F401  (imported before forking)
from lightning_compress.modifiers.distillation import modifier as _distillation  # noqa: F401
from lightning_compress.modifiers.gptq import modifier as _gptq  # noqa: F401
from lightning_compress.modifiers.tune import modifier as _tune  # noqa: F401
from lightning_compress.resume.folder_log import FolderLog
from lightning_compress.training.post_training import PostTraining
from tests.support.training_runs import Regression, Sums, quiet

EPOCHS, BATCHES = 3, 3
STATIC = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}


def network(width: int = 16) -> nn.Sequential:
    """Dropout, so that the random state counts; BatchNorm, so that buffers do."""
    return nn.Sequential(
        nn.Linear(8, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.3), nn.Linear(width, width), nn.ReLU(),
        nn.Linear(width, 4),
    )  # fmt: skip


class Residual(nn.Module):
    """A block."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu())


class Stack(nn.Module):
    """Blocks, and modules before and after them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.blocks, self.last = (
            nn.Linear(8, 16),
            nn.ModuleList(Residual() for _ in range(3)),
            nn.Linear(16, 4),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


class ByStep(Regression):
    """Its batches depend on the step alone: where a loader goes on is not this package's business."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(torch.optim.AdamW)
        self.model = model

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x = torch.randn(6, 8, generator=torch.Generator().manual_seed(self.global_step))
        return nn.functional.cross_entropy(self.model(x), torch.arange(6) % 4)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.model(batch[0]).square().mean())


class Halting(Callback):
    """Stands still at the moment of the kill."""

    def __init__(self, reached: Callable[..., None]):
        self.reached = reached

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        self.reached("batch", trainer.global_step)

    def on_after_backward(self, trainer: Any, *args: Any) -> None:
        self.reached("backward", trainer.global_step)


def modifiers(case: str) -> list[Modifier]:
    """The recipe of a case; what a case of a new modifier is called is up to its test."""
    lc = lightning_compress
    torch.manual_seed(1)
    wide = network(24)
    int4 = {"scheme": "W4A16", "group_size": 8}
    static = {"config_groups": {"g": {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
        "input_activations": STATIC,
    }}}  # fmt: skip
    recipes: dict[str, Callable[[], list[Modifier]]] = {
        "qat_lsq": lambda: [lc.QATModifier(**int4, start=1, end=8)],
        "qat_ste": lambda: [lc.QATModifier(**int4, gradient="ste", observe_until=6, freeze_bn_at=4)],
        "qat_static": lambda: [lc.QATModifier(**static, averaging_constant=0.3, start=1, observe_until=6)],
        "magnitude": lambda: [lc.MagnitudePruningModifier(start=1, end=7, update=2)],
        "magnitude_2of4": lambda: [lc.MagnitudePruningModifier(mask_structure="2:4", start=0.3, unit="fraction")],
        "magnitude_global": lambda: [lc.MagnitudePruningModifier(scope="global", start=0, end=2, unit="epoch")],
        "movement": lambda: [lc.MovementPruningModifier(start=1, end=7, update=2, final_sparsity=0.7)],
        "movement_soft": lambda: [
            lc.MovementPruningModifier(mode="soft", score_lr=0.5, threshold=0.4, unit="fraction", end=0.8),
            lc.QATModifier(**int4),
        ],
        "learned_mask": lambda: [
            lc.LearnedMaskModifier(start=1, end=6, regularization=1e-3),
            lc.QATModifier(**int4, start=6),
        ],
        "constant": lambda: [
            lc.MagnitudePruningModifier(start=1, end=2, group="first"),
            lc.ConstantPruningModifier(start=3, end=8),
        ],
        "distill_hidden": lambda: [
            lc.DistillationModifier(teacher=wide, hidden={"0": "0", "4": "4"}, init_weight=0.1, weight=0.9,
                                    schedule="linear", start=1, end=8),
        ],
        "structured": lambda: [
            lc.StructuredPruningModifier(dimension="channels", ratio=0.5, start=0, input_shape=[8]),
        ],
        "structured_gradual": lambda: [
            lc.StructuredPruningModifier(
                dimension="channels", ratio=0.5, importance="taylor", start=1, end=7, update=2, round_to=2
            ),
        ],
        "structured_late": lambda: [
            lc.StructuredPruningModifier(dimension="channels", ratio=0.25, importance="activation", start=3),
        ],
        "stack_structured": lambda: [
            lc.DistillationModifier(weight=0.5),
            lc.StructuredPruningModifier(dimension="channels", ratio=0.5, start=2, round_to=8),
            lc.GPTQModifier(**int4),
        ],
        "blocks_gptq": lambda: [lc.GPTQModifier(**int4)],
        "blocks_prune": lambda: [
            lc.SparseGPTModifier(sparsity_profile="owl", sparsity=0.5),
            lc.AWQModifier(**int4, n_grid=3, quantize=False),
            lc.QuantizationModifier(**int4, scale_search="hessian"),
        ],
        "blocks_tune": lambda: [
            lc.GPTQModifier(scheme={"weights": {"num_bits": 2, "group_size": 8, "strategy": "group"}}),
            lc.TuneModifier(loss="mse", epochs=4, patience=4, lr=0.03),
        ],
        "freeze": lambda: [lc.FreezeModifier(targets=["0", "4"], start=2, end=5)],
        "stack_qat": lambda: [
            lc.DistillationModifier(weight=0.5),
            lc.MagnitudePruningModifier(unit="fraction", start=0.1, end=0.75, update=0.01),
            lc.QATModifier(**int4),
        ],
        "stack_gptq": lambda: [
            lc.MagnitudePruningModifier(mask_structure="2:4", start=0.25, unit="fraction"),
            lc.DistillationModifier(weight=0.5),
            lc.GPTQModifier(**int4),
        ],
    }  # fmt: skip
    return recipes[case]()


def run(case: str, folder: Path, kill: list[Any] | None, halt: Callable[[], None]) -> None:
    """One attempt at the run of a case, in a process of its own."""

    def reached(moment: str, number: int = -1) -> None:
        if kill is not None and kill[0] == moment and kill[1:] in ([], [number]):
            halt()

    _interpose(reached)
    _count_groups(folder, reached)
    last = folder / "kept" / "last.ckpt"
    torch.manual_seed(0)
    module = ByStep(Stack() if case.startswith("blocks") else network())
    recipe = modifiers(case)
    seed = os.getpid() if last.exists() else 7
    torch.manual_seed(seed)
    random.seed(seed)
    kept = ModelCheckpoint(folder / "kept", save_last=True, every_n_train_steps=1)
    validate = {} if case == "stack_gptq" else {"limit_val_batches": 0}
    callback = CompressionCallback(recipe, calibration_batches=2, verify=False)
    trainer = quiet(folder, Halting(reached), callback, kept, max_epochs=EPOCHS, **validate)
    trainer.fit(module, Sums(batches=BATCHES), ckpt_path="last")
    assert callback.done


def _interpose(reached: Callable[..., None]) -> None:
    """Tell when files are written and models compressed; this process ends after the run, so nothing is put back."""

    def after(owner: Any, name: str, tell: Callable[..., None]) -> None:
        original = getattr(owner, name)

        def told(*args: Any, **kwargs: Any) -> Any:
            tell(*args)
            return original(*args, **kwargs)

        setattr(owner, name, told)

    after(PostTraining, "compress", lambda end: reached("finish"))
    after(atomic, "_sync", lambda folder: reached("export"))
    after(lightning_compress.MagnitudePruningModifier, "on_training_end", lambda *args: reached("calibration"))
    after(lightning_compress.GPTQModifier, "on_calibration_end", lambda *args: reached("calibration"))

    write = LocalFileOpener.write

    def half(opener: Any, data: bytes) -> int:
        final, middle = Path(opener.path), len(data) // 2
        write(opener, data[:middle])
        opener.f.flush()
        if final.name == "compressed.ckpt":
            reached("promote")
        elif final.name == "last.ckpt":
            reached("writing", torch.load(_buffer(data), weights_only=True)["global_step"])
        return middle + write(opener, data[middle:])

    LocalFileOpener.write = half


def _count_groups(folder: Path, reached: Callable[..., None]) -> None:
    """Tell when a group of modules is finished, and write its number into ``groups.txt``."""
    store = FolderLog.store

    def counted(log: Any, title: str, group: Any) -> None:
        with (folder / "groups.txt").open("a") as file:
            file.write(f"{log._number}\n")
        reached("solved", log._number)
        store(log, title, group)
        reached("stored", log._number)

    FolderLog.store = counted
    store_training = FolderLog.store_training

    def noted(log: Any, title: str, tensors: Any, facts: Any) -> None:
        epochs = len(facts["losses"]) - 1
        with (folder / "groups.txt").open("a") as file:
            file.write(f"epoch-{epochs}\n")
        reached("trained", epochs)
        store_training(log, title, tensors, facts)
        reached("tuned", epochs)

    FolderLog.store_training = noted


def _buffer(data: bytes) -> Any:
    import io

    return io.BytesIO(data)


def attempt(case: str, folder: Path, kill: list[Any] | None) -> dict[str, Any]:
    """Fork a run, and kill it where it stands still."""
    telling, told = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(telling)

        def halt() -> None:
            os.write(told, b"x")
            time.sleep(300)

        try:
            warnings.simplefilter("ignore")
            run(case, folder, kill, halt)
        except BaseException:
            (folder / "failed.txt").write_text(traceback.format_exc())
            os._exit(1)
        os._exit(0)
    os.close(told)
    reached = os.read(telling, 1) == b"x"
    if reached:
        os.kill(child, signal.SIGKILL)
    os.close(telling)
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    failed = None if killed or status == 0 else (folder / "failed.txt").read_text()
    return {"killed": killed, "failed": failed}


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        order = json.loads(line)
        folder = Path(order["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        print(json.dumps(attempt(order["case"], folder, order["kill"])), flush=True)


if __name__ == "__main__":
    main()
