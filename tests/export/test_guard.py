"""save_pretrained of compressed models."""

import copy
import pickle

import pytest
import torch
from torch.testing import assert_close

from lightning_compress.export.load import load
from lightning_compress.export.save import save
from lightning_compress.modifiers.kv_cache import KVCacheModifier
from lightning_compress.modifiers.quantization import QuantizationModifier
from lightning_compress.oneshot import compress

IDS = torch.arange(24).reshape(2, 12)


@pytest.mark.parametrize(
    ("modifier", "lost"),
    [
        (QuantizationModifier(scheme="W8A8"), r"the quantization of inputs \(\d+ modules, such as model\.layers\.0\."),
        (KVCacheModifier(), r"the quantization of the KV cache \(2 modules, such as model.layers.0.self_attn\)"),
    ],
    ids=["inputs", "cache"],
)
def test_it_is_refused_where_something_is_lost(tmp_path, tiny_llama, modifier, lost):
    model = tiny_llama()
    compress(model, modifier, [{"input_ids": IDS}])
    for each in (model, copy.deepcopy(model), model.model, load(save(model, tmp_path / "out"), packed=False)):
        with pytest.raises(ValueError, match=r"save_pretrained would lose .*call lightning_compress.save\(model, fold"):
            each.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=lost):
        model.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
    assert_close(pickle.loads(pickle.dumps(model))(IDS).logits, model(IDS).logits, rtol=0, atol=0)


def test_packed_weights(tmp_path, tiny_llama):
    model = tiny_llama()
    compress(model, QuantizationModifier(scheme="W8A16", group_size=-1))
    loaded = load(save(model, tmp_path / "out"), packed=True)
    with pytest.raises(ValueError, match="would lose how packed weights are read"):
        loaded.save_pretrained(tmp_path / "plain")
    save(loaded, tmp_path / "again")


def test_weights_on_a_grid_are_written_dense_and_right(tmp_path, tiny_llama):
    model = tiny_llama()
    compress(model, QuantizationModifier(scheme="W8A16", group_size=-1))
    model.save_pretrained(tmp_path / "plain")
    with torch.no_grad():
        assert_close(type(model).from_pretrained(tmp_path / "plain")(IDS).logits, model(IDS).logits, rtol=0, atol=0)
