"""Tiny models on a grid: rounded to nearest, with records, as a modifier leaves them."""

from collections.abc import Callable, Sequence

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme
from torch import Tensor, nn

from lightning_compress.layers.matching import select
from lightning_compress.layers.matrix import as_matrix, write_matrix
from lightning_compress.quant.fake_quant import round_weight
from lightning_compress.quant.record import Quantized
from lightning_compress.quant.scales import minmax
from tests.support import plain_reader


def make_scheme(name: str, targets: Sequence[str] = ("Linear",), **weights) -> QuantizationScheme:
    """A preset, a scheme with these ``weights``, or int8 weights and inputs: token, static, static asymmetric."""
    inputs = {
        "token": {"strategy": "token", "dynamic": True, "symmetric": False},
        "static": {"symmetric": True},
        "static asymmetric": {"symmetric": False},
    }.get(name)
    if weights:
        return QuantizationScheme(targets=list(targets), weights=QuantizationArgs(**weights))
    if inputs is None:
        return preset_name_to_scheme(name, list(targets))
    int8 = QuantizationArgs(num_bits=8, strategy="channel")
    return QuantizationScheme(targets=list(targets), weights=int8, input_activations=QuantizationArgs(**inputs))


def to_grid(module: nn.Module, scheme: QuantizationScheme) -> None:
    weight_RC = as_matrix(module).clone()
    scale, zero_point = minmax(weight_RC, scheme.weights)
    write_matrix(module, round_weight(weight_RC, scale, zero_point, scheme.weights))
    inputs, input_scale, input_zero_point = scheme.input_activations, None, None
    if inputs is not None and not inputs.dynamic:
        input_scale = torch.tensor([0.02], dtype=weight_RC.dtype)
        input_zero_point = None if inputs.symmetric else torch.tensor([5], dtype=torch.int8)
    Quantized(scheme, scale, zero_point, input_scale, input_zero_point).attach(module)


@pytest.fixture(scope="session")
def scheme_of() -> Callable[..., QuantizationScheme]:
    return make_scheme


@pytest.fixture(scope="session")
def quantize() -> Callable[..., nn.Module]:
    """Round the targets of a scheme to their grid and attach the records."""

    def run(model: nn.Module, scheme: QuantizationScheme, ignore: Sequence[str] = ()) -> nn.Module:
        for module in select(model, scheme.targets, ignore).values():
            to_grid(module, scheme)
        return model.eval()

    return run


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., nn.Module]:
    def build(dtype: torch.dtype = torch.float32, **settings) -> nn.Module:
        from transformers import AutoModelForCausalLM, LlamaConfig

        sizes = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        config = LlamaConfig(**(sizes | heads | settings))
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()  # rotary tables stay float32

    return build


@pytest.fixture
def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Linear(32, 8)).eval()


@pytest.fixture(scope="session")
def read_by_transformers() -> Callable[..., dict[str, Tensor]]:
    """Logits that a process without this package computes: of ROOT/name, a folder, on ROOT/name.batch."""
    return plain_reader.read_by_transformers
