"""Answers come back as they went in; files are whole or not there; others' files are seen, damaged ones are named."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightning_compress.modifiers.distillation import answer_cache as module
from lightning_compress.modifiers.distillation.answer_cache import AnswerCache

IDENTITY = {"teacher": "abc", "top_k": 2}


def answer(seed, tokens=3):
    generator = torch.Generator().manual_seed(seed)
    return {
        "log_p": torch.randn(tokens, 2, generator=generator).half(),
        "index": torch.randint(0, 60000, (tokens, 2), generator=generator).to(torch.uint16),
        "rest": torch.randn(tokens, 4, generator=generator),
    }


def key(number):
    return number.to_bytes(16, "little")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def files(cache):
    return sorted(p.name for p in cache.folder.iterdir())


def test_answers_come_back_from_memory_from_disk_and_in_another_process_life(tmp_path):
    first = AnswerCache(tmp_path, IDENTITY, 1e9, shard=400)  # a shard for every few samples
    sizes = [3, 1, 5, 2, 4, 0, 7]
    for i, tokens in enumerate(sizes):
        first.put(key(i), answer(i, tokens))
        assert same(first.get(key(i)), answer(i, tokens))
    first.close()
    assert len(files(first)) > 1
    again = AnswerCache(tmp_path, IDENTITY, 1e9)
    assert len(again) == len(sizes)
    for i in (6, 0, 3, 5, 1, 2, 4):
        assert key(i) in again
        assert same(again.get(key(i)), answer(i, sizes[i]))
    assert key(99) not in again
    assert again.get(key(99)) is None


def test_what_is_known_is_not_written_twice(tmp_path):
    cache = AnswerCache(tmp_path, IDENTITY, 1e9)
    for _ in range(2):
        cache.put(key(1), answer(1))
        cache.flush()
    assert len(files(cache)) == 1
    assert same(cache.get(key(1)), answer(1))


def test_another_identity_has_its_own_folder(tmp_path):
    mine = AnswerCache(tmp_path, IDENTITY, 1e9)
    mine.put(key(1), answer(1))
    mine.close()
    for other in ({"teacher": "other", "top_k": 2}, {"teacher": "abc", "top_k": 3}):
        assert len(AnswerCache(tmp_path, other, 1e9)) == 0
    assert len(AnswerCache(tmp_path, {"top_k": 2, "teacher": "abc"}, 1e9)) == 1


def test_two_writers_share_a_folder(tmp_path):
    one, two = (AnswerCache(tmp_path, IDENTITY, 1e9) for _ in range(2))
    one.put(key(1), answer(1))
    two.put(key(2), answer(2))
    one.flush()
    two.flush()
    assert key(2) not in one
    one.refresh()
    assert same(one.get(key(2)), answer(2))
    assert one.bytes == sum((one.folder / name).stat().st_size for name in files(one))


def test_more_shards_than_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "OPEN_SHARDS", 2)
    cache = AnswerCache(tmp_path, IDENTITY, 1e9, shard=1)
    for i in range(6):
        cache.put(key(i), answer(i))
    for i in [0, 5, 3, 0, 2, 4, 1]:
        assert same(cache.get(key(i)), answer(i))
        assert len(cache._open) <= 2


def test_the_limit_holds_and_warns_once(tmp_path):
    cache = AnswerCache(tmp_path, IDENTITY, 550)
    for i in range(5):
        cache.put(key(i), answer(i))
    said = r"is full: 5 samples take 0.00 of cache_limit_gib=\S+; .* Raise the limit"
    with pytest.warns(UserWarning, match=said) as told:
        cache.put(key(5), answer(5))
    cache.put(key(6), answer(6))
    assert len(told) == 1
    assert len(cache) == 5
    assert same(cache.get(key(2)), answer(2))
    assert len(AnswerCache(tmp_path, IDENTITY, 1e9)) == 5


def test_a_disk_that_is_full_ends_the_writing_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    def no_space(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    cache = AnswerCache(tmp_path, IDENTITY, 1e9)
    cache.put(key(1), answer(1))
    monkeypatch.setattr(module, "save_file", no_space)
    with pytest.warns(UserWarning, match="No space left on device; no more answers are added, the teacher goes on"):
        cache.flush()
    assert files(cache) == []
    assert key(1) not in cache
    cache.put(key(2), answer(2))
    assert len(cache) == 0


WRITER = """
import os, sys, torch
from lightning_compress.modifiers.distillation import answer_cache as module

def killed(tensors, path, metadata):
    path.write_bytes(b"half")
    print("half", flush=True)
    if sys.argv[2] == "dies":
        os._exit(9)
    sys.stdin.read()

module.save_file = killed
cache = module.AnswerCache(sys.argv[1], {"teacher": "abc", "top_k": 2}, 1e9)
cache.put(b"k" * 16, {"rest": torch.zeros(1)})
cache.flush()
"""


def test_half_written_files_of_the_dead_go_and_those_of_the_living_stay(tmp_path):
    def writer(fate):
        run = [sys.executable, "-c", WRITER, str(tmp_path), fate]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        process = subprocess.Popen(run, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        assert process.stdout.readline() == b"half\n"
        return process

    dead = writer("dies")
    dead.wait(60)
    living = writer("lives")
    try:
        cache = AnswerCache(tmp_path, IDENTITY, 1e9)
        assert len(files(cache)) == 1
        assert f"-{living.pid}-" in files(cache)[0]
        assert len(cache) == 0
    finally:
        living.kill()
        living.communicate()
    assert files(AnswerCache(tmp_path, IDENTITY, 1e9)) == []


def test_half_written_files_of_another_machine_go_after_a_day(tmp_path):
    cache = AnswerCache(tmp_path, IDENTITY, 1e9)
    for name, age in (("new", 60), ("old", 2 * 86400)):
        path = cache.folder / f".elsewhere-12-{name}.partial-00.safetensors"
        path.write_bytes(b"half")
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - age))
    AnswerCache(tmp_path, IDENTITY, 1e9)
    assert [name for name in files(cache) if "old" in name] == []
    assert len([name for name in files(cache) if "new" in name]) == 1


def test_a_damaged_file_and_one_of_another_teacher_are_named_and_passed_over(tmp_path):
    cache = AnswerCache(tmp_path, IDENTITY, 1e9)
    cache.put(key(1), answer(1))
    cache.close()
    whole = cache.folder / files(cache)[0]
    (cache.folder / "cut.safetensors").write_bytes(whole.read_bytes()[:-40])
    with pytest.warns(UserWarning, match=r"cut.safetensors is not a whole file of a teacher cache .*passed over"):
        again = AnswerCache(tmp_path, IDENTITY, 1e9)
    assert len(again) == 1
    (cache.folder / "cut.safetensors").unlink()

    other = AnswerCache(tmp_path, {"teacher": "other"}, 1e9)
    other.put(key(2), answer(2))
    other.close()
    moved = other.folder / files(other)[0]
    moved.rename(cache.folder / "moved.safetensors")
    with pytest.warns(UserWarning, match="holds the answers of another teacher"):
        assert key(2) not in AnswerCache(tmp_path, IDENTITY, 1e9)


def nan(tensors):
    tensors["rest"][4, 1] = torch.nan


def bit(tensors):
    tensors["index"].view(torch.uint8)[-1, 0] ^= 4


DAMAGE = {
    "ends descend": lambda t: t["ends"].copy_(t["ends"].flip(0)),
    "ends negative": lambda t: t["ends"].neg_(),
    "ends beyond the rows": lambda t: t["ends"].add_(10**6),
    "ends moved by one": lambda t: t["ends"].add_(1),
    "ends of floats": lambda t: t.update(ends=t["ends"].double()),
    "too few ends": lambda t: t.update(ends=t["ends"][1:].clone()),
    "keys of floats": lambda t: t.update(keys=t["keys"].float()),
    "no checks": lambda t: t.pop("checks"),
    "NaN": nan,
    "one bit": bit,
    "a part is missing": lambda t: t.pop("index"),
    "a part is too narrow": lambda t: t.update(rest=t["rest"][:, 1:].clone()),
    "a part of one number": lambda t: t.update(rest=torch.tensor(1.0)),
    "a part of another type": lambda t: t.update(index=t["index"].long()),
    "rows shifted": lambda t: t.update(rest=t["rest"].roll(1, 0)),
    "keys exchanged": lambda t: t.update(keys=t["keys"].flip(0)),
}


def read_all(folder, numbers):
    cache = AnswerCache(folder, IDENTITY, 1e9)
    return cache, {i: cache.get(key(i)) for i in numbers}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_answer_is_never_used(tmp_path, kind):
    """Its file is named, once, and the rest of the cache stays in use."""
    cache = AnswerCache(tmp_path, IDENTITY, 1e9)
    sizes = {1: 3, 2: 1, 3: 2}
    for i, tokens in sizes.items():
        cache.put(key(i), answer(i, tokens))
    cache.close()
    (name,) = files(cache)
    cache.put(key(9), answer(9))
    cache.close()
    tensors = load_file(cache.folder / name)
    DAMAGE[kind](tensors)
    save_file(tensors, cache.folder / name, metadata={"identity": cache.identity})
    with pytest.warns(UserWarning, match=rf"{name} is not a whole file of a teacher cache .*passed over") as told:
        again, answers = read_all(tmp_path, sizes)
    assert len(told) == 1
    assert all(answers[i] is None or same(answers[i], answer(i, tokens)) for i, tokens in sizes.items())
    assert key(3) not in again
    assert same(again.get(key(9)), answer(9))
    again.put(key(3), answer(3, 2))
    again.close()
    assert same(again.get(key(3)), answer(3, 2))


def test_a_file_states_the_identity_of_its_answers(tmp_path):
    cache = AnswerCache(tmp_path, IDENTITY, 1e9)
    cache.put(key(1), answer(1))
    cache.close()
    with safe_open(cache.folder / files(cache)[0], "pt") as shard:
        assert shard.metadata() == {"identity": '{"teacher": "abc", "top_k": 2}'}


def test_a_folder_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cache_dir='.*file' cannot be made: .*; choose another"):
        AnswerCache(tmp_path / "file", IDENTITY, 1e9)
