"""What every kind of record does alike: attach, find, copy, move, to JSON and back."""

import copy
import json
from dataclasses import dataclass, field

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_compress.layers.records import Record, has_record
from lightning_compress.modifiers.rotation.online import OnlineRotation, OnlineRotations
from lightning_compress.quant.kv_cache import QuantizedCache
from lightning_compress.quant.record import Quantized
from lightning_compress.structure.surgery import Structure


def _double(module, args):
    return (2 * args[0],)


def _negate(module, args, kwargs, output):
    return -output


@dataclass(frozen=True)
class Doubling(Record):
    """Doubles the input of its module and negates the output."""

    attribute = "_test_doubling"
    hooks = (_double, _negate)

    scale: Tensor
    secret: Tensor | None = field(default=None, metadata={"stored": False})

    def register(self, module):
        module.register_forward_pre_hook(_double)
        module.register_forward_hook(_negate, with_kwargs=True)


RECORDS = {
    "quantized": Quantized(preset_name_to_scheme("W8A8", ["Linear"]), torch.rand(4, 1, dtype=torch.float64)),
    "cache": QuantizedCache(QuantizationArgs(num_bits=8), torch.ones(1), torch.ones(1)),
    "online": OnlineRotations((OnlineRotation("input", (1, -1)), OnlineRotation("output", (-1, 1)))),
    "structure": Structure(({"layers": {"0": [0, 2]}, "attributes": {}, "config": {}},)),
    "doubling": Doubling(torch.rand(3).bfloat16()),
}


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
def test_a_record_is_found_where_it_was_attached_and_nothing_else_changes(record):
    kind, model = type(record), nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    before, keys = copy.copy(vars(model[1][0])), list(model.state_dict())
    record.attach(model[1][0])
    record.attach(model[1][0])  # replaced, not doubled
    module, again = kind.find(model)["1.0"]
    assert (list(kind.find(model)), module, again) == (["1.0"], model[1][0], record)
    assert kind.of(model[0]) is None
    assert list(model.state_dict()) == keys
    assert len(module._forward_pre_hooks) <= 1
    twin = copy.deepcopy(model)
    kind.detach(module)
    kind.detach(module)  # a second time: nothing
    assert vars(module).keys() == before.keys()
    assert not module._forward_pre_hooks
    assert not module._forward_hooks
    assert not module._forward_pre_hooks_with_kwargs
    assert list(kind.find(twin)) == ["1.0"]
    assert not kind.find(model)


@pytest.mark.parametrize("name", ["quantized", "online", "structure"])
def test_json_gives_back_the_record(name):
    record = RECORDS[name]
    again = type(record).from_json(json.loads(json.dumps(record.to_json())))
    assert vars(again).keys() == vars(record).keys()
    for key, value in vars(record).items():
        if isinstance(value, Tensor):
            assert_close(getattr(again, key), value, rtol=0, atol=0)
        else:
            assert getattr(again, key) == value


def test_tensors_in_json_are_exact_and_some_fields_stay_out():
    record = Doubling(torch.tensor([[0.1, 3.0]], dtype=torch.bfloat16), secret=torch.ones(1))
    data = record.to_json()
    assert data == {"scale": {"dtype": "bfloat16", "shape": [1, 2], "values": [0.10009765625, 3.0]}}
    assert torch.equal(Doubling.from_json(data).scale, record.scale)


def test_hooks_act_until_the_record_is_removed_also_on_a_copy():
    layer, x = nn.Linear(3, 3, bias=False), torch.randn(2, 3)
    expected = layer(x)
    RECORDS["doubling"].attach(layer)
    twin = copy.deepcopy(layer)
    for one in (layer, twin):
        assert_close(one(x), -2 * expected)
        Doubling.detach(one)
        assert_close(one(x), expected)


def test_kinds_do_not_disturb_each_other():
    layer = nn.Linear(4, 4)
    assert not has_record(layer)
    RECORDS["online"].attach(layer)
    RECORDS["doubling"].attach(layer)
    assert has_record(layer)
    Doubling.detach(layer)
    assert OnlineRotations.of(layer) == RECORDS["online"]
    assert len(layer._forward_pre_hooks) == len(layer._forward_hooks) == 1


def test_all_tensors_move_and_the_rest_stays():
    record = Quantized(RECORDS["quantized"].scheme, torch.ones(2, 1), latent=torch.ones(2, 4))
    moved = record.to(torch.device("meta"))
    assert moved.scale.is_meta
    assert moved.latent.is_meta
    assert moved.zero_point is None
    assert moved.scheme is record.scheme
    assert not record.scale.is_meta
