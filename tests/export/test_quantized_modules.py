"""How much memory ``load`` takes: parameters are made one by one, and packed modules are never dense."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_compress import load, save
from tests.support.allocations import allocated

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "vocab_size": 128}
LARGEST = 256 * 512 * 4  # bytes of the largest weight


@pytest.fixture(scope="module")
def folder(tmp_path_factory, quantize, scheme_of):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=6, tie_word_embeddings=False, **SIZES))
    return save(quantize(model, scheme_of("W4A16"), ["lm_head"]), tmp_path_factory.mktemp("memory") / "out")


@pytest.mark.parametrize("packed", [None, False])
def test_one_weight_beside_a_dense_model(folder, packed):
    peak, largest, model = allocated(lambda: load(folder, packed=packed, fuse=False))
    dense = sum(p.nbytes for p in model.parameters())
    assert dense <= peak <= dense + 5 * LARGEST  # codes, their steps to float32, records of scales
    assert largest <= LARGEST


def test_packed_modules_are_never_dense(folder):
    peak, largest, model = allocated(lambda: load(folder, packed=True, fuse=False))
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert peak <= 1.1 * size
    assert largest <= 128 * 256 * 4  # the embedding


def test_fusing_makes_one_module_dense_at_a_time(folder):
    peak, _, _ = allocated(lambda: load(folder, packed=True))
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert peak <= size + 6 * LARGEST
