"""Hidden states on the disk: the same tensors, the same result, nothing left in the folder."""

import errno
import os

import pytest
import torch

from lightning_compress import CompressionCallback, GPTQModifier, compress
from lightning_compress.calibration import activations
from lightning_compress.calibration.activations import SegmentInputs
from lightning_compress.calibration.hidden_file import HiddenFile
from tests.support.calibration_models import C, Layered, make_batches, seeded
from tests.support.training_runs import Regression, Sums, quiet


def numbers(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def same(one, other):
    return torch.equal(one, other) and one.dtype == other.dtype and one.stride() == other.stride()


def test_tensors_come_back_with_their_dtypes_and_strides(tmp_path):
    tensors = [numbers(2, 5, 4, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)]
    tensors += [numbers(3, 4).t(), numbers(8, 4)[2:5], numbers(2, 3, 4, 5).to(memory_format=torch.channels_last)]
    file = HiddenFile(tmp_path, [None, *tensors])
    assert file[0] is None
    assert all(same(file[i], tensor) for i, tensor in enumerate(tensors, 1))
    assert os.listdir(tmp_path) == []  # also while it is open


def test_a_later_tensor_takes_the_place_of_an_earlier_one_of_its_size(tmp_path):
    file = HiddenFile(tmp_path, [numbers(4, 8), numbers(2, 8)])
    file[0], file[1] = numbers(8, 4), numbers(3, 8)
    assert same(file[0], numbers(8, 4))
    assert same(file[1], numbers(3, 8))
    assert os.fstat(file._file.fileno()).st_size == 4 * (32 + 16 + 24)


def test_the_copy_of_the_dense_model_goes_its_own_way(tmp_path):
    inputs = SegmentInputs.kept(torch.device("cpu"), tmp_path)
    inputs.add(numbers(4), {})
    dense = inputs.dense_copy()
    dense.replace(0, numbers(2, 2))
    assert same(inputs.hidden[0], numbers(4))
    assert same(dense.hidden[0], numbers(2, 2))


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    file = HiddenFile(tmp_path)

    class Full:
        def seek(self, _start):
            """Nothing to do."""

        def write(self, _data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(file, "_file", Full())
    message = rf"batch 0 \(32 bytes\) into {tmp_path} failed: .*No space left.*; is the disk full\? Give another folder"
    with pytest.raises(OSError, match=message):
        file.append(numbers(8))


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(
        ValueError, match=rf"no file can be made in {tmp_path / 'absent'}: .*; give the path of another"
    ):
        HiddenFile(tmp_path / "absent")


@pytest.mark.parametrize("walk", ["one_pass", "two_pass"])
def test_the_result_is_that_of_hidden_states_in_memory(tmp_path, walk):
    weights = []
    for where in ("memory", str(tmp_path)):
        model = seeded(Layered)
        recipe = GPTQModifier(scheme="W4A16", group_size=C)
        compress(model, recipe, make_batches(3, 2, 5, C), walk=walk, cache_activations=where)
        weights.append(model.state_dict())
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())
    assert os.listdir(tmp_path) == []


def test_a_trainer_stores_them_in_the_folder_of_the_run(tmp_path, monkeypatch):
    folders = []

    class Noted(HiddenFile):
        def __init__(self, folder, *args):
            folders.append(folder)
            super().__init__(folder, *args)

    monkeypatch.setattr(activations, "HiddenFile", Noted)
    callback = CompressionCallback(
        GPTQModifier(scheme="W4A16", group_size=4), cache_activations="disk", blocks="Linear"
    )
    quiet(tmp_path, callback).fit(Regression(), Sums())
    assert set(folders) == {tmp_path}
