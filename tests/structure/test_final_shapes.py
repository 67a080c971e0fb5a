"""Whether shapes are final when another modifier begins to keep tensors of them."""

from types import SimpleNamespace

import pytest

from lightning_compress.structure.final_shapes import shape_conflict


def modifier(start=None, end=None, unit="epoch", fixed="start"):
    return SimpleNamespace(start=start, end=end, unit=unit, needs=SimpleNamespace(fixed_shapes_from=fixed))


@pytest.mark.parametrize(
    ("cutting", "other", "earlier", "fits"),
    [
        (modifier(0), modifier(0), False, True),
        (modifier(0), modifier(0), True, False),  # at one moment the order of the recipe decides
        (modifier(0), modifier(3), True, True),
        (modifier(0, 4), modifier(3), False, False),
        (modifier(0, 3), modifier(3), False, True),
        (modifier(0, 4), modifier(3, unit="step"), True, True),  # not comparable here
        (modifier(), modifier(3), False, False),  # cut after training
        (modifier(0, 4), modifier(3, fixed="never"), True, True),
        (modifier(0, 4), modifier(9, fixed="set-up"), False, False),
    ],
)
def test_the_last_cut_comes_before_the_first_tensor(cutting, other, earlier, fits):
    fault = shape_conflict(cutting, other, {"layer"}, earlier)
    assert (fault is None) == fits
    if fault is not None:
        assert fault.startswith("'layer' changes its shape after the other keeps tensors of that shape; cut at set-up")
    assert shape_conflict(cutting, other, set(), earlier) is None
