"""The export of a sharded model is, byte for byte, that of the same model with plain parameters."""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_compress import QATModifier, QuantizationModifier, compress, save
from lightning_compress.core import Ledger, Lifecycle, State
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
            save(model, tmp_path / "sharded", stored=stored)
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
            save(model, tmp_path / "sharded", stored=stored)
        assert torch.equal(model(x).logits, expected)
    assert files(tmp_path / "sharded") == files(tmp_path / "plain")
    assert sharded_rows == rows
