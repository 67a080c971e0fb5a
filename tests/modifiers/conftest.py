"""The tiny Llama that the tests of exports use."""

from tests.export.conftest import tiny_llama

__all__ = ["tiny_llama"]
