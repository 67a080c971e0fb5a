"""A modifier that trains after the walk: the last whole state is found again, and a killed run ends with equal bits."""

import json

import pytest
import torch

from lightning_compress import TuneModifier, compress
from lightning_compress.modifiers.tune import descent
from lightning_compress.resume.folder_log import FolderLog, random_state, remove
from lightning_compress.resume.training_log import TrainingLog, remove_training
from tests.resume.test_folder_log import RECIPES, Killed, contents, ids, llama


def written(folder, count, title="one"):
    log = TrainingLog(folder)
    assert log.read(title) is None
    for i in range(1, count + 1):
        log.write(title, {"values": torch.full((3,), i, dtype=torch.float32)}, {"losses": [0.1 * i]}, random_state())
    return sorted(path.name for path in (folder / ".training.partial").glob("*.safetensors"))


def found(folder, title="one"):
    state = TrainingLog(folder).read(title)
    return None if state is None else (state[0][0]["values"].tolist(), state[0][1])


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_the_last_state_is_found_and_two_files_are_enough(tmp_path, count):
    assert len(written(tmp_path, count)) == min(count, 2)
    assert found(tmp_path) == ([count] * 3, {"losses": [0.1 * count]})
    assert found(tmp_path, "another") is None
    remove_training(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["a byte of the tensors", "a fact", "no entry"])
def test_where_the_last_state_is_damaged_the_one_before_it_counts(tmp_path, damage):
    written(tmp_path, 4)
    folder = tmp_path / ".training.partial"  # state 4 is in shard 1
    entry, shard = folder / "log" / "00001.json", folder / "model-00001-of-00002.safetensors"
    if damage == "no entry":
        entry.unlink()
    elif damage == "a fact":
        content = json.loads(entry.read_text())
        content["facts"]["facts"]["losses"] = [9.0]
        entry.write_text(json.dumps(content))
    else:
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
    assert found(tmp_path)[0] == [3.0] * 3


def test_another_title_takes_both_files(tmp_path):
    written(tmp_path, 3)
    written(tmp_path, 3, title="two")
    assert found(tmp_path) is None
    assert found(tmp_path, "two")[0] == [3.0] * 3


@pytest.fixture
def killing(monkeypatch):
    """``killing(epochs, steps)``: the next run ends when that much of tuning is stored, or done after it."""
    store, interrupt, step = FolderLog.store_training, descent._step, [0]
    at = {}

    def stored(self, title, *state):
        store(self, title, *state)
        at["stored"] += 1
        if at["stored"] == at["epochs"] and at["steps"] == 0:
            raise Killed

    def stepped(*arguments):
        interrupt(*arguments)
        at["taken"] += 1
        step[0] += at["stored"] >= at["epochs"]
        if step[0] == at["steps"] != 0:
            raise Killed

    def kill(epochs, steps=0):
        step[0] = 0
        at.update(epochs=epochs, steps=steps, stored=0, taken=0)
        return at

    monkeypatch.setattr(FolderLog, "store_training", stored)
    monkeypatch.setattr(descent, "_step", stepped)
    kill(epochs=-1)
    return kill


def run(folder, **arguments):
    model, tuned = llama(), TuneModifier(epochs=4, patience=4, lr=3e-2)
    ledger = compress(model, [*RECIPES["gptq, tune"]()[:1], tuned], ids(4), log=folder, **arguments)
    return contents(model, ledger)


@pytest.mark.parametrize(("epochs", "steps"), [(0, 2), (1, 0), (2, 1), (4, 0)])
def test_tuning_goes_on_after_the_last_epoch_and_is_equal_bit_for_bit(tmp_path, killing, epochs, steps):
    """Killed at the end of an epoch, in the middle of one, and before the best state is written."""
    unbroken = run(tmp_path / "unbroken")
    killing(epochs, steps)
    with pytest.raises(Killed):
        run(tmp_path / "log")
    torch.manual_seed(7)  # another process begins with another random state
    second = killing(-1)
    assert run(tmp_path / "log", resume="must") == unbroken
    assert (second["stored"], second["taken"]) == (4 - epochs, 3 * (4 - epochs))  # three batches are not held out


def test_a_finished_log_gives_the_tuned_model_without_a_step(tmp_path, killing):
    unbroken = run(tmp_path / "log")
    again = killing(-1)
    assert run(tmp_path / "log", resume="must") == unbroken
    assert again["taken"] == 0
    anew = killing(-1)
    assert run(tmp_path / "log", resume="never") == unbroken
    assert anew["taken"] == 12
    remove(tmp_path / "log")
    assert not (tmp_path / "log").exists()


def test_a_log_of_tuning_stays_small(tmp_path):
    """Two states of four float32 numbers for each that is trained, three as long as no epoch is better than none."""
    run(tmp_path / "log")
    sizes = [path.stat().st_size for path in tmp_path.glob("log/.training.partial/*.safetensors")]
    model = llama()
    trained = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    trained += sum(m.weight.numel() // 32 for n, m in model.named_modules() if n.endswith("proj"))
    assert len(sizes) == 2
    assert all(12 * trained <= size < 32 * trained for size in sizes), (sizes, trained)
