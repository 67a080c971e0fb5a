"""What a server says of bits and models: the same sentences in plans and in model cards."""

from compressed_tensors.quantization import QuantizationScheme
from torch import nn

from lightning_compress.export.readers import foreign_kind, server_fault


def scheme(bits: int, inputs: int | None = None) -> QuantizationScheme:
    active = None if inputs is None else {"num_bits": inputs, "dynamic": True}
    return QuantizationScheme(targets=["Linear"], weights={"num_bits": bits}, input_activations=active)


def test_odd_numbers_of_bits_are_named_once_and_in_order():
    assert server_fault([scheme(4), scheme(8), scheme(2, inputs=8)]) == ""
    odd = "2, 3 bits need a recent version, and a kernel for the GPU"
    assert server_fault([scheme(3), scheme(2), scheme(3), scheme(4)]) == odd


def test_the_class_of_a_foreign_model_is_named():
    assert foreign_kind(nn.Linear(1, 1)).startswith("a Linear is not a model of transformers")
