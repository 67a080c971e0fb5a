"""The tiny models on a grid that the tests of exports use."""

from tests.export.conftest import quantize, scheme_of, tiny_llama

__all__ = ["quantize", "scheme_of", "tiny_llama"]
