"""The checkpoint contract on two ranks (gloo processes): equal masks and scales, and every rank's own numbers."""

from contextlib import suppress

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from pydantic import PrivateAttr
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_compress import CompressionCallback, DistillationModifier, MagnitudePruningModifier, QATModifier
from tests.support.training_runs import RecordingModifier, Regression, Sums, quiet

DDP = {"strategy": "ddp_fork", "devices": 2, "max_epochs": 2}
STATIC = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}
ROWS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}


class Teacher(nn.Sequential):
    """Wider than the student: its hidden states are met through a projection."""

    def __init__(self):
        super().__init__(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 1))


class Witness(Callback):
    """Each rank writes down what its modifiers hold when training ends."""

    def on_train_end(self, trainer, pl_module):
        mine = next(c for c in trainer.callbacks if isinstance(c, CompressionCallback))
        drawn = [getattr(m, "_drawn", []) for m in mine.lifecycle.modifiers]
        held = {"modifiers": mine.lifecycle.state_dict(), "weights": pl_module.state_dict(), "drawn": drawn}
        torch.save(held, f"{trainer.default_root_dir}/rank{trainer.global_rank}.pt")


class Seeds(Callback):
    """Ranks with random states of their own."""

    def __init__(self, seed):
        self.seed = seed

    def on_train_start(self, trainer, *args):
        torch.manual_seed(self.seed + trainer.global_rank)


class Cut(Callback):
    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == 4:
            raise KeyError("power cut")


class Draws(RecordingModifier):
    """Draws a number before each step."""

    _drawn: list[float] = PrivateAttr(default_factory=list)

    def on_update(self, state, event, **kwargs):
        if event.type_ == "optim_pre_step":
            self._drawn.append(torch.rand(()).item())


def recipes(name):
    torch.manual_seed(3)
    teacher = Teacher()
    prune = MagnitudePruningModifier(start=1, end=6)
    if name == "pruning":
        return [prune]
    if name == "global":
        return [MagnitudePruningModifier(start=1, end=6, scope="global")]
    distill = DistillationModifier(teacher=teacher, hidden={"0": "0"}, weight=0.5)
    groups = {"g": {"targets": ["Linear"], "weights": ROWS, "input_activations": STATIC}}
    return [distill, prune, QATModifier(config_groups=groups, start=2)]


def ranks(folder):
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def same(one, two, place=""):
    """Names of what differs."""
    if isinstance(one, dict):
        assert one.keys() == two.keys(), place
        return [line for key in one for line in same(one[key], two[key], f"{place}.{key}")]
    if isinstance(one, torch.Tensor):
        return [] if torch.equal(one, two) else [place]
    return [] if one == two else [place]


@pytest.mark.parametrize("name", ["pruning", "global", "stack"])
def test_two_ranks_hold_the_same(tmp_path, name):
    torch.manual_seed(0)
    module = Regression(torch.optim.AdamW)
    callbacks = [Witness(), CompressionCallback(recipes(name), evaluate=False)]
    quiet(tmp_path, *callbacks, **DDP).fit(module, Sums(batches=8))
    zero, one = ranks(tmp_path)
    assert same(zero["weights"], one["weights"]) == []
    assert same(zero["modifiers"], one["modifiers"]) == []
    masks = zero["modifiers"]["MagnitudePruningModifier"]["masks"].values()
    assert torch.cat([mask.flatten() for mask in masks]).float().mean() == 0.5


def test_every_rank_goes_on_with_its_own_random_numbers(tmp_path):
    def run(folder, seed, *callbacks, **fit):
        modifier = Draws(start=0)
        trainer = quiet(folder, Seeds(seed), Witness(), CompressionCallback(modifier), *callbacks, **DDP)
        with suppress(Exception):
            trainer.fit(Regression(), Sums(batches=8), **fit)

    saving = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
    for folder in ("whole", "resumed"):
        (tmp_path / folder).mkdir()
    run(tmp_path / "whole", 5)
    run(tmp_path / "cut", 5, saving, Cut())
    run(tmp_path / "resumed", 99, ckpt_path=tmp_path / "last.ckpt")
    whole, resumed = ranks(tmp_path / "whole"), ranks(tmp_path / "resumed")
    assert whole[0]["drawn"] != whole[1]["drawn"]
    for rank in (0, 1):
        assert whole[rank]["drawn"][0][4:] == resumed[rank]["drawn"][0]


def test_two_ranks_resume_the_same_run(tmp_path):
    def run(folder, seed, *callbacks, **fit):
        torch.manual_seed(seed)
        callback = CompressionCallback(recipes("stack"), evaluate=False)
        trainer = quiet(folder, Witness(), callback, *callbacks, **DDP)
        with suppress(Exception):
            trainer.fit(Regression(torch.optim.AdamW), Sums(batches=8), **fit)

    saving = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
    run(tmp_path / "whole", 0)
    run(tmp_path / "cut", 0, saving, Cut())
    run(tmp_path / "resumed", 0, ckpt_path=tmp_path / "last.ckpt")
    whole, resumed = ranks(tmp_path / "whole"), ranks(tmp_path / "resumed")
    for rank in (0, 1):
        assert same(whole[rank]["weights"], resumed[rank]["weights"]) == []
        assert same(whole[rank]["modifiers"], resumed[rank]["modifiers"]) == []


def test_weights_that_the_module_shards_by_itself_are_refused(tmp_path):
    """``fully_shard`` by hand, in configure_model of a module that an ordinary strategy trains."""

    class Shards(Regression):
        def configure_model(self):
            fully_shard(self.model, mesh=init_device_mesh("cpu", (1,)))

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="is sharded \\(a DTensor\\), and SingleDeviceStrategy does not save"):
            quiet(tmp_path, CompressionCallback(recipes("pruning"), module="model")).fit(Shards(), Sums())
    finally:
        dist.destroy_process_group()
