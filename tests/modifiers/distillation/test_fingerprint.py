"""Equal samples have equal keys wherever they stand; anything that the answer may depend on changes them."""

import pytest
import torch
from torch import nn

from lightning_compress.modifiers.distillation.fingerprint import real_lengths, sample_keys, teacher_hash


def test_a_sample_has_one_key_wherever_it_stands_in_the_batch():
    x = torch.randn(6, 4)
    order = torch.randperm(6)
    keys = sample_keys({"x": x, "flag": True}, 6, None)
    assert sample_keys({"x": x[order], "flag": True}, 6, None) == [keys[i] for i in order]
    assert sample_keys({"x": x[2:3], "flag": True}, 1, None) == [keys[2]]
    assert len(set(keys)) == 6
    assert {len(k) for k in keys} == {16}


def test_whatever_the_answer_depends_on_changes_the_key():
    x = torch.arange(8).view(2, 4)
    base = sample_keys({"x": x}, 2, None)
    for other in (
        {"x": x + 1}, {"y": x}, {"x": x.int()}, {"x": x.view(2, 2, 2)}, {"x": x, "scale": 2.0},
        {"x": x, "table": torch.ones(3)}, {"x": {"a": x}},
    ):  # fmt: skip
        assert not set(base) & set(sample_keys(other, 2, None))
    nested = sample_keys({"x": x, "table": torch.ones(3)}, 2, None)
    assert not set(nested) & set(sample_keys({"x": x, "table": torch.tensor([1.0, 1.0, 2.0])}, 2, None))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool, torch.uint8, torch.float64])
def test_every_dtype_has_bytes(dtype):
    x = torch.randn(3, 5).to(dtype)
    assert len(sample_keys({"x": x}, 3, None)) == 3


def test_trailing_padding_does_not_count_and_leading_does():
    ids, mask = torch.tensor([[5, 6, 0, 0], [7, 8, 9, 1]]), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    assert real_lengths(mask) == [2, 4]
    long = sample_keys({"ids": ids, "attention_mask": mask}, 2, real_lengths(mask))
    short = sample_keys({"ids": ids[:1, :2], "attention_mask": mask[:1, :2]}, 1, [2])
    assert short == long[:1]
    left = torch.tensor([[0, 0, 1, 1]])
    assert real_lengths(left) == [4]
    assert sample_keys({"ids": ids[:1].flip(1), "attention_mask": left}, 1, [4]) != short
    assert real_lengths(torch.zeros(1, 3)) == [0]


def test_what_has_no_bytes_is_refused():
    with pytest.raises(ValueError, match=r"is called with \['cache'\] of type object, expected tensors, numbers"):
        sample_keys({"x": torch.ones(1, 2), "cache": object()}, 1, None)


def test_a_teacher_is_known_by_every_value_and_by_its_layers():
    def teacher(seed=0, **options):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(4, 8, 3, **options), nn.BatchNorm2d(8))

    base = teacher_hash(teacher())
    assert base == teacher_hash(teacher())
    assert len({base, teacher_hash(teacher(1)), teacher_hash(teacher(stride=2)), teacher_hash(teacher().double())}) == 4
    changed = teacher()
    with torch.no_grad():
        changed[0].weight[4, 2, 1, 1] += 1e-3  # in the midst of a tensor
    assert teacher_hash(changed) != base


def test_a_callable_is_known_by_its_name():
    assert teacher_hash(torch.nn.functional.relu) == "callable torch.nn.functional.relu"
