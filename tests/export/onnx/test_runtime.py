import math

import torch

from lightning_compress.export.onnx.runtime import difference


def test_the_largest_distance_relative_to_the_norm():
    expected = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1, 2, 3, 4])}
    outputs = {"a": torch.tensor([3.0, 4.5]), "b": torch.tensor([1, 2, 3, 5])}
    assert difference(outputs, expected) == (0.25, "b")
    assert difference(outputs | {"b": expected["b"]}, expected) == (0.1, "a")


def test_other_shapes_and_numbers_that_are_not_finite():
    infinite = torch.tensor([1.0, -math.inf])
    assert difference({"a": infinite}, {"a": infinite}) == (0.0, "a")
    assert difference({"a": infinite}, {"a": torch.ones(2)}) == (math.inf, "a")
    assert difference({"a": torch.ones(3)}, {"a": torch.ones(2)}) == (math.inf, "a")
    assert difference({"a": torch.tensor(math.nan)}, {"a": torch.tensor(1.0)})[0] == math.inf
