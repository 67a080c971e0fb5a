"""A part that fails after the model is compressed is named in a warning; an interrupt passes."""

import pytest

from lightning_compress.training.failures import as_warning


def test_an_error_is_a_warning_that_names_the_part():
    message = "^the page is not complete, while the compressed model is: OSError: disk full$"
    with pytest.warns(UserWarning, match=message), as_warning("the page"):
        raise OSError("disk full")


def test_an_interrupt_is_not_a_warning():
    with pytest.raises(KeyboardInterrupt), as_warning("the page"):
        raise KeyboardInterrupt
