"""Results of a Hessian go with it, and never to disk."""

import pickle

from lightning_compress.layerwise.input_hessian import SharedHessian
from lightning_compress.layerwise.per_hessian import PerHessian


def test_a_result_lives_as_long_as_its_statistic():
    first, second, results = SharedHessian(), SharedHessian(), PerHessian()
    results[first], results[second] = "a", "b"
    assert results[first] == "a"
    del first
    assert list(results.values()) == ["b"]


def test_a_pickled_one_is_empty():
    shared, results = SharedHessian(), PerHessian()
    results[shared] = "a"
    assert dict(pickle.loads(pickle.dumps(results))) == {}
    assert results[shared] == "a"
