from torch import nn

from lightning_compress.modifiers import BlockHadamardModifier, GPTQModifier, RotationModifier
from lightning_compress.planning.readers import readers_of
from tests.planning.test_copies import llama


def test_packed_four_bits_are_read_by_all():
    modifier = GPTQModifier(scheme="W4A16", group_size=32)
    assert not any(readers_of(llama(1), [modifier], {"model.layers.0.mlp.up_proj": modifier.schemes[0]}).values())


def test_three_bits_need_a_kernel_in_a_server():
    modifier = GPTQModifier(scheme={"weights": {"num_bits": 3, "group_size": 32}})
    readers = readers_of(llama(1), [modifier], {"model.layers.0.mlp.up_proj": modifier.schemes[0]})
    assert readers == {
        "lightning_compress.load": "",
        "transformers": "",
        "vLLM": "3 bits need a recent version, and a kernel for the GPU",
    }


def test_other_models_are_read_by_load_alone():
    readers = readers_of(nn.Sequential(nn.Linear(8, 8)), [], {})
    assert not readers["lightning_compress.load"]
    assert "not a model of transformers" in readers["vLLM"]


def test_rotations_beside_layers_are_named():
    readers = readers_of(llama(1), [RotationModifier(rotations=["R1", "R4"], allow_online=True)], {})
    assert readers["transformers"] == "what RotationModifier runs beside the layers is lost"
    readers = readers_of(llama(1), [BlockHadamardModifier(transform_config=True)], {})
    assert [name for name, fault in readers.items() if fault] == ["transformers"]
