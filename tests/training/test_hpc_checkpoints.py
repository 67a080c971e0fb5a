"""``hpc_ckpt_N.ckpt``: how many are kept, and what takes the place of the last one."""

import signal
from types import SimpleNamespace

import pytest

from lightning_compress.team import Team
from lightning_compress.training.hpc_checkpoints import HpcCheckpoints
from tests.support.preempted_runs import Signals
from tests.support.training_runs import Regression, Sums, quiet, rounding

pytestmark = pytest.mark.filterwarnings("ignore:.*exists and is not empty")


def test_the_last_two_checkpoints_are_kept(tmp_path, slurm):
    for attempt in range(4):
        signals = Signals(signal.SIGUSR1, {"on_train_batch_start": [1]})
        with pytest.raises(SystemExit):
            quiet(tmp_path, rounding(), signals, max_epochs=9).fit(Regression(), Sums())
        if attempt == 1:
            (tmp_path / "hpc_ckpt_1.ckpt").unlink()
            (tmp_path / "hpc_ckpt_1.ckpt").mkdir()  # as sharded checkpoints are
    assert sorted(path.name for path in tmp_path.glob("hpc*")) == ["hpc_ckpt_3.ckpt", "hpc_ckpt_4.ckpt"]


def test_a_folder_of_shards_takes_the_place_of_the_last_checkpoint(tmp_path):
    for name, content in (("hpc_ckpt_2.ckpt", "trained"), ("compressed.ckpt", "compressed")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "meta.pt").write_text(content)
    barrier = SimpleNamespace(barrier=lambda name: None)
    trainer = SimpleNamespace(default_root_dir=tmp_path, is_global_zero=True, strategy=barrier)
    HpcCheckpoints(trainer, Team()).supersede(tmp_path / "compressed.ckpt")
    contents = {path.name: (path / "meta.pt").read_text() for path in tmp_path.iterdir()}
    assert contents == {"hpc_ckpt_2.ckpt": "compressed", "compressed.ckpt": "compressed"}
