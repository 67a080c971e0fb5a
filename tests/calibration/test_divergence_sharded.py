"""Two ranks that shard a model with FSDP2 find the distances of blocks that one rank finds, also for odd batches."""

from pathlib import Path

import pytest
import torch

from lightning_compress import CompressionCallback, GPTQModifier
from tests.support.sharded_runs import Language, trainer
from tests.support.two_ranks import run_two_ranks

CASES = {4: 2, 3: 2}  # batches: how many are compared; two ranks share 4, and each runs all of 3


def run(folder: Path, ranks: int) -> None:
    for batches, count in CASES.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lightning_compress.calibration.walker.compared_batches", lambda of, rows, n=count: n)
            callback = CompressionCallback(
                GPTQModifier(scheme="W4A16", group_size=16), verify=False, calibration_batches=batches
            )
            runner = trainer(folder / str(batches), callback, ranks=ranks, max_epochs=0)
            runner.fit(Language())
        torch.save(callback.ledger.blocks, folder / f"{batches}-{runner.global_rank}.pt")


@pytest.mark.slow
def test_ranks_that_hold_shards_find_what_one_rank_finds(tmp_path):
    import transformers.models.llama.modeling_llama  # noqa: F401  (once, not in each process)

    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()

    def work(rank: int) -> None:
        torch.set_num_threads(1)
        run(two, 2)

    assert run_two_ranks(work, two, 200) == ["", ""]
    run(one, 1)
    for batches, count in CASES.items():
        expected = torch.load(one / f"{batches}-0.pt")
        assert list(expected) == ["model.layers.0", "model.layers.1"]
        for rank in (0, 1):
            blocks = torch.load(two / f"{batches}-{rank}.pt")
            for name, facts in expected.items():
                assert facts["rows"] == 4 * count
                assert blocks[name] == pytest.approx(facts, rel=1e-3)
