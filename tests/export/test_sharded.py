"""The export of a sharded model is, byte for byte, that of the same model with plain parameters."""

import re
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_compress import QATModifier, QuantizationModifier, compress, save
from lightning_compress.core import Ledger, Lifecycle, State
from lightning_compress.export import sharded as exporting
from lightning_compress.export.save import write_compressed_tensors
from lightning_compress.export.sharded import gathered_on
from lightning_compress.layers.sharded import is_sharded
from tests.support.sharded_runs import group_of_one, llama


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def shard(model):
    mesh = init_device_mesh("cpu", (1,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def test_a_quantized_model(tmp_path):
    model = llama()
    compress(model, QuantizationModifier(scheme="W4A16", group_size=16, ignore=["lm_head"]))
    save(model, tmp_path / "plain")
    with group_of_one():
        shard(model)
        with gathered_on(model, True) as stored:
            assert len(stored) == 14
            assert model.model.layers[0].mlp.up_proj.weight.is_meta
            write_compressed_tensors(model, tmp_path / "sharded", stored=stored)
        assert is_sharded(model)
        with gathered_on(model, False) as stored:  # another rank
            assert not stored
            assert is_sharded(model)
    assert files(tmp_path / "sharded") == files(tmp_path / "plain")


def test_a_model_that_was_trained_through_fake_quantization(tmp_path):
    def trained(sharded):
        model = llama()
        lifecycle, state = (
            Lifecycle([QATModifier(scheme="W4A16", group_size=16, ignore=["lm_head"])]),
            State(model, ledger=Ledger()),
        )
        lifecycle.initialize(state)
        if sharded:
            shard(model)
        lifecycle.finalize(state)
        return model, state.ledger.state_dict()

    model, rows = trained(False)
    save(model, tmp_path / "plain")
    x = torch.arange(8)[None]
    expected = model(x).logits
    with group_of_one():
        model, sharded_rows = trained(True)
        assert torch.equal(model(x).logits, expected)
        with gathered_on(model, True) as stored:
            write_compressed_tensors(model, tmp_path / "sharded", stored=stored)
        assert torch.equal(model(x).logits, expected)
    assert files(tmp_path / "sharded") == files(tmp_path / "plain")
    assert sharded_rows == rows


def private_memory():
    """Bytes of this process that are not pages of a file."""
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_what_is_gathered_is_on_the_disk(tmp_path):
    model = llama(layers=4, hidden=512)
    size = sum(parameter.nbytes for parameter in model.parameters())
    compress(model, QuantizationModifier(scheme="W8A16", targets=["re:.*mlp.*"]))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with group_of_one():
        shard(model)
        used = private_memory()
        with gathered_on(model, True, tmp_path) as stored:
            assert private_memory() - used < size / 4
            dense = dict(model.named_parameters())
            assert all(torch.equal(value, before[name]) for name, value in dense.items() if not value.is_meta)
            assert len(stored) == sum(value.is_meta for value in dense.values()) == 12
    assert list(tmp_path.iterdir()) == []


def test_a_weight_that_cannot_be_packed_is_an_error_once_all_ranks_have_gathered(monkeypatch):
    gathered = []
    monkeypatch.setattr(exporting, "full", lambda tensor: gathered.append(tensor.shape) or tensor.full_tensor())
    model = llama()
    compress(model, QuantizationModifier(scheme="W4A16", group_size=16, ignore=["lm_head"]))
    model.model.layers[0].mlp.up_proj.weight.data += 1
    with group_of_one():
        shard(model)
        with pytest.raises(RuntimeError, match=r"up_proj"), gathered_on(model, True):
            pass
        assert is_sharded(model)
    assert len(gathered) == 7  # embeddings, head, the norms of two blocks and the last one
