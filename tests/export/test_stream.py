"""Shards are an export at the end, and what a killed run continues from until then."""

import contextlib
import json
import os
import shutil

import pytest
import torch

from lightning_compress.export import stream
from lightning_compress.export.stream import ShardWriter
from lightning_compress.export.tensors import TensorFiles
from lightning_compress.files.atomic_folder import MANIFEST

ROWS = [{"module": "b.1", "technique": "gptq", "error": 0.25}]


def tensors_of(number):
    return {f"b.{number}.weight": torch.full((2, 3), float(number)), f"b.{number}.bias": torch.ones(3)}


def written(target, count=3, until=None, **options):
    writer = ShardWriter(target, count, **options)
    for number in range(1, (count if until is None else until) + 1):
        writer.write(number, tensors_of(number), {"state": number}, ROWS)
    return writer


def finish(target, count=3, **options):
    """As a run that continues: the rest, and the end."""
    writer = ShardWriter(target, count, **options)
    for number in range(len(writer.finished()) + 1, count + 1):
        writer.write(number, tensors_of(number))
    (writer.folder / "config.json").write_text("{}")
    return writer.finish()


def check_export(target, count=3):
    files = TensorFiles(target)
    expected = {name: tensor for number in range(1, count + 1) for name, tensor in tensors_of(number).items()}
    manifest = json.loads((target / MANIFEST).read_text())["files"]
    assert sorted({*manifest, MANIFEST}) == sorted(os.listdir(target))
    shards = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    assert sorted(manifest) == ["config.json", *shards, "model.safetensors.index.json"]
    rest = files.rest()
    assert rest.keys() == expected.keys()
    assert all(torch.equal(rest[name][...], expected[name]) for name in expected)
    assert os.listdir(target.parent) == [target.name]


def test_the_shards_become_the_export(tmp_path):
    writer = written(tmp_path / "out")
    assert os.listdir(tmp_path) == [".out.partial"]
    (writer.folder / "config.json").write_text("{}")
    (writer.log / "plan.json").write_text("{}")
    assert writer.finish() == tmp_path / "out"
    check_export(tmp_path / "out")


def test_another_process_continues_after_the_last_complete_shard(tmp_path):
    written(tmp_path / "out", until=2)
    writer = ShardWriter(tmp_path / "out", 3)
    shards = writer.finished()
    assert [shard.number for shard in shards] == [1, 2]
    assert shards[1].facts == {"state": 2}
    assert shards[1].rows == ROWS
    tensors = writer.read(shards[1])
    assert tensors.keys() == tensors_of(2).keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in tensors_of(2).items())
    check_export(finish(tmp_path / "out"))


def flip_a_byte(writer):
    path = writer.folder / "model-00002-of-00003.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut(writer):
    path = writer.folder / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def change(**values):
    def damage(writer):
        path = writer.log / "00002.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


def put(text):
    return lambda writer: (writer.log / "00002.json").write_text(text)


def lose(name):
    return lambda writer: (writer.folder / name).unlink()


DAMAGES = {
    "flipped byte": flip_a_byte,
    "cut shard": cut,
    "no shard": lose("model-00002-of-00003.safetensors"),
    "no entry": lose("log/00002.json"),
    "other names": change(tensors=["b.2.weight", "../../x"]),
    "a name twice": change(tensors=["b.2.weight", "b.2.bias", "b.2.bias"]),
    "another version": change(format_version=2),
    "a list of numbers": change(tensors=[1, 2]),
    "rows": change(rows=[3]),
    "further keys": change(path="/etc/passwd"),
    "not an object": put("[]"),
    "not JSON": put("{"),
    "nested": put("[" * 100_000),
    "empty": put(""),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_bad_shard_and_all_after_it_are_written_again(tmp_path, damage):
    damage(written(tmp_path / "out"))
    writer = ShardWriter(tmp_path / "out", 3)
    assert [shard.number for shard in writer.finished()] == [1]
    writer.write(2, tensors_of(2))
    # the third, which followed a bad one, is not taken either, although its checksum fits
    assert [shard.number for shard in ShardWriter(tmp_path / "out", 3).finished()] == [1, 2]
    check_export(finish(tmp_path / "out"))


def test_a_large_entry_is_not_parsed(tmp_path, monkeypatch):
    written(tmp_path / "out")
    monkeypatch.setattr(stream, "ENTRY_BYTES", 10)
    monkeypatch.setattr(json, "loads", lambda _text: pytest.fail("parsed"))
    assert ShardWriter(tmp_path / "out", 3).finished() == []


def test_another_number_of_shards_begins_anew(tmp_path):
    written(tmp_path / "out")
    writer = ShardWriter(tmp_path / "out", 4)
    assert writer.finished() == []
    check_export(finish(tmp_path / "out", 4), 4)


def test_foreign_files_in_the_partial_folder_do_not_enter_the_export(tmp_path):
    writer = written(tmp_path / "out")
    (writer.folder / "old.txt").write_text("x")
    (writer.folder / "model.safetensors.index.json").write_text("{}")
    (writer.folder / "folder").mkdir()
    check_export(finish(tmp_path / "out"))


def test_discard_begins_anew(tmp_path):
    writer = written(tmp_path / "out")
    assert not ShardWriter(tmp_path / "out", 3).is_empty
    writer.discard()
    assert writer.is_empty
    assert writer.finished() == []
    check_export(finish(tmp_path / "out"))


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("call", range(6))
def test_a_kill_inside_of_finish_loses_nothing(tmp_path, monkeypatch, call, overwrite):
    """The process ends before its n-th call that changes the disk: nothing that is cleaned up after errors runs."""

    class Killed(BaseException):
        pass

    target = tmp_path / "out"
    if overwrite:
        finish(target)
    writer = written(target, overwrite=overwrite)
    (writer.folder / "config.json").write_text("{}")
    calls = []

    def counted(real):
        def counting(*args, **kwargs):
            calls.append(real)
            if len(calls) > call:
                raise Killed
            return real(*args, **kwargs)

        return counting

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", counted(os.rename))
        patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
        patch.setattr("lightning_compress.files.atomic_folder._exchange", lambda *_: False)
        patch.setattr("lightning_compress.export.stream.swap_in", counted(stream.swap_in))
        with contextlib.suppress(Killed):
            writer.finish()
    if len(calls) > call:
        monkeypatch.setattr("lightning_compress.files.leftovers.is_running", lambda _process: False)
        leftover = ShardWriter(target, 3, overwrite=True)
        shards = leftover.finished()
        assert len(shards) == 3 or (target / MANIFEST).exists()
        finish(target, overwrite=True)
    check_export(target)


def test_an_existing_folder_is_refused_at_the_start(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="exists and is not empty"):
        ShardWriter(tmp_path / "out", 3)


def test_a_folder_that_was_filled_meanwhile_is_kept_and_so_are_the_shards(tmp_path):
    writer = written(tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="exists and is not empty"):
        writer.finish()
    shutil.rmtree(tmp_path / "out")
    assert len(ShardWriter(tmp_path / "out", 3).finished()) == 3
    check_export(finish(tmp_path / "out"))


def test_a_full_disk_keeps_what_is_written(tmp_path, monkeypatch):
    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    writer = written(tmp_path / "out", until=1)
    with monkeypatch.context() as patch:
        patch.setattr(stream, "write_file", full)
        with pytest.raises(OSError, match="No space left on device; is the disk full\\? Finished shards stay"):
            writer.write(2, tensors_of(2))
    assert sorted(os.listdir(writer.folder)) == ["log", "model-00001-of-00003.safetensors"]
    check_export(finish(tmp_path / "out"))


def test_views_of_one_tensor_and_transposes_are_written(tmp_path):
    base = torch.arange(6.0).reshape(2, 3)
    writer = ShardWriter(tmp_path / "out", 1)
    writer.write(1, {"a": base, "b": base.t(), "c": base[1], "d": base})
    tensors = writer.read(writer.finished()[0])
    assert torch.equal(tensors["b"], base.t())
    assert torch.equal(tensors["c"], base[1])
    assert torch.equal(tensors["a"], base)
    assert torch.equal(tensors["d"], base)
