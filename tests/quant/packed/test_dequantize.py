"""After ``dequantize`` a model is dense, with the weights it had, and may be compressed again."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lightning_compress import dequantize
from lightning_compress.export.load import load
from lightning_compress.export.save import save
from lightning_compress.modifiers.kv_cache import KVCacheModifier
from lightning_compress.modifiers.quantization import QuantizationModifier
from lightning_compress.oneshot import compress
from lightning_compress.quant.packed import PackedLinear

IDS = torch.arange(24).reshape(2, 12)


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 32))


class Adapted(nn.Module):
    """LoRA as peft does it: beside the layer, then added to its weight in place."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.a, self.b = nn.Parameter(torch.randn(4, 128) / 8), nn.Parameter(torch.zeros(layer.out_features, 4))

    def forward(self, x):
        return self.layer(x) + x @ self.a.t() @ self.b.t()

    def merged(self):
        self.layer.weight.data += self.b.detach() @ self.a.detach()
        return self.layer


@pytest.mark.parametrize("scheme", ["W4A16", "W8A8", "FP8", "NVFP4A16"])
def test_an_adapter_trained_on_packed_weights_is_merged_and_compressed_again(tmp_path, scheme):
    model, x = build(), torch.randn(8, 5, 128)
    compress(model, QuantizationModifier(scheme=scheme), [x])
    folder = save(model, tmp_path / "first")
    packed = load(folder, build(), packed=True)
    adapted = nn.Sequential(Adapted(packed[0]), nn.Tanh(), Adapted(packed[2]))
    adapters = [p for name, p in adapted.named_parameters() if name.rpartition(".")[2] in "ab"]
    optimizer = torch.optim.Adam(adapters, 0.02)
    for _ in range(3):
        adapted(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    dense = load(folder, build(), packed=False)
    wanted = []
    for index in (0, 2):
        adapter = adapted[index]
        wanted.append(dense[index].weight.detach() + (adapter.b @ adapter.a).detach())
        adapter.layer = dense[index]
        dense[index] = adapter.merged()

    recipe = QuantizationModifier(scheme=scheme)
    with pytest.raises(RuntimeError, match=r"merging an adapter; call lightning_compress.dequantize\(model\)"):
        save(dense, tmp_path / "second")
    with pytest.raises(ValueError, match=r"or call lightning_compress.dequantize\(model\) where its weights"):
        compress(dense, recipe, [x])
    assert dequantize(dense) == ["0", "2"]
    for index, weight in zip((0, 2), wanted, strict=True):
        assert torch.equal(dense[index].weight, weight)
    assert torch.equal(dense(x), dense[2](dense[1](nn.functional.linear(x, wanted[0], dense[0].bias))))
    compress(dense, recipe, [x])
    again = load(save(dense, tmp_path / "second"), build(), packed=False)
    assert torch.equal(again(x), dense(x))


def test_packed_weights_become_linears(tmp_path):
    model, x = build(), torch.randn(8, 128)
    compress(model, QuantizationModifier(scheme="W4A16"))
    packed = load(save(model, tmp_path / "net"), build(), packed=True)
    assert isinstance(packed[0], PackedLinear)
    assert dequantize(packed) == ["0", "2"]
    assert [type(layer) for layer in packed] == [nn.Linear, nn.Tanh, nn.Linear]
    assert_close(packed(x), model(x), rtol=0, atol=0)
    assert {n: p.requires_grad for n, p in packed.named_parameters()} == dict.fromkeys(model.state_dict(), True)
    assert dequantize(packed) == []


@pytest.mark.filterwarnings("ignore")
def test_caches_and_embeddings_are_forgotten_too(tiny_llama):
    model = tiny_llama(num_hidden_layers=1)
    scheme = {"W8A8": ["Linear"], "W8A16": ["Embedding"]}
    recipe = [KVCacheModifier(), QuantizationModifier(scheme=scheme, group_size=-1, ignore=["lm_head"])]
    compress(model, recipe, [{"input_ids": IDS}])
    weights = copy.deepcopy(model.state_dict())
    names = dequantize(model)
    assert len(names) == 9  # 7 Linears, the embedding, the cache
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
