"""The callback's state in checkpoints: dense keys, plain values, and what another process reads."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_compress import CompressionCallback, QATModifier
from tests.support.training_runs import Regression, RoundingModifier, Sums, quiet


def test_the_checkpoint_has_dense_keys_and_plain_state(tmp_path):
    module = Regression()
    dense = list(module.state_dict())
    quiet(tmp_path, CompressionCallback(RoundingModifier())).fit(module, Sums())
    saved = torch.load(tmp_path / "compressed.ckpt", weights_only=True)
    assert list(saved["state_dict"]) == dense
    kept = saved["callbacks"]["CompressionCallback"]
    assert kept["done"] is True
    assert kept["clock"] == {"steps": [4], "batches": 4}
    assert list(kept["modifiers"]) == ["RoundingModifier"]
    assert Regression.load_from_checkpoint(tmp_path / "compressed.ckpt").is_rounded()


DAMAGE = [{"clock": None}, {"modifiers": []}, {"recipe": 3}, {"ledger": [3]}, {"done": ...}]


@pytest.mark.parametrize("damage", DAMAGE, ids=str)
def test_a_state_that_is_not_ours_is_one_clear_error(damage):
    callback = CompressionCallback(RoundingModifier())
    state = callback.state_dict()
    for key, value in damage.items():
        if value is ...:
            del state[key]
        else:
            state[key] = value
    with pytest.raises(ValueError, match="a state of CompressionCallback that cannot be read"):
        CompressionCallback(RoundingModifier()).load_state_dict(state)


def test_a_checkpoint_of_unfinished_training_says_what_it_lacks_in_a_new_process(tmp_path, recwarn):
    def callback(start):
        return CompressionCallback(QATModifier(scheme="W4A16", group_size=8, start=start))

    for start in (0, 99):
        folder = tmp_path / str(start)
        keeping = ModelCheckpoint(folder / "kept", save_last=True)
        quiet(folder, callback(start), keeping).fit(Regression(), Sums())
        recwarn.clear()
        trainer = quiet(folder / "fresh", callback(start))
        trainer.test(Regression(), Sums(), ckpt_path=folder / "kept" / "last.ckpt", verbose=False)
        told = [str(w.message) for w in recwarn if "has not compressed its model yet" in str(w.message)]
        assert len(told) == (start == 0)
        assert all("without what QATModifier makes of them; resume the run" in text for text in told)
