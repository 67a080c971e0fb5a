"""A group of modules as tensors and facts, and back: equal bits on both sides, and the codes that an export holds."""

import copy
import json

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from safetensors.torch import load, save
from torch import nn

from lightning_compress.layers.records import Record
from lightning_compress.layers.split_experts import split
from lightning_compress.modifiers.quantization import QuantizationModifier
from lightning_compress.modifiers.rotation.online import OnlineRotation, OnlineRotations
from lightning_compress.oneshot import compress
from lightning_compress.quant.kv_cache import QuantizedCache
from lightning_compress.quant.module_state import from_tensors, settle, to_tensors
from lightning_compress.quant.packing import pack
from lightning_compress.quant.record import Quantized
from lightning_compress.quant.schemes import presets

TENSORS = ("scale", "zero_point", "input_scale", "input_zero_point", "global_scale", "input_global_scale", "latent")


def bits(value):
    return value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def through_files(modules):
    """What :func:`to_tensors` gives, written and read as safetensors and JSON."""
    tensors, facts = to_tensors(modules)
    return load(save(tensors)), json.loads(json.dumps(facts))


def named(model):
    return dict(model.named_modules())


def assert_equal_bits(one, other):
    """Parameters, buffers, records and hooks."""
    for (name, a), (again, b) in zip(one.named_modules(), other.named_modules(), strict=True):
        assert name == again
        tensors = [{**m._parameters, **m._buffers} for m in (a, b)]
        assert {k: v is None or (v.dtype, bits(v)) for k, v in tensors[0].items()} == {
            k: v is None or (v.dtype, bits(v)) for k, v in tensors[1].items()
        }, name
        records = [{k: v for k, v in vars(m).items() if isinstance(v, Record)} for m in (a, b)]
        assert records[0].keys() == records[1].keys()
        for key, record in records[0].items():
            theirs = records[1][key]
            assert record.to_json() == theirs.to_json()
            for field, value in vars(record).items():
                if isinstance(value, torch.Tensor):
                    its = getattr(theirs, field)
                    assert (its.dtype, its.shape, bits(its)) == (value.dtype, value.shape, bits(value)), (name, field)
                    assert not its.is_inference()
                else:
                    assert getattr(theirs, field) == value
        assert list(a._forward_pre_hooks.values()) == list(b._forward_pre_hooks.values())


def codes(model):
    return {name: {k: bits(v) for k, v in pack(name, m, r).items()} for name, (m, r) in Quantized.find(model).items()}


class Net(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(32, 256, dtype=dtype)
        self.first, self.second = nn.Linear(256, 128, dtype=dtype), nn.Linear(128, 256, bias=False, dtype=dtype)
        self.norm, self.bn = nn.LayerNorm(256, dtype=dtype), nn.BatchNorm1d(256, dtype=dtype)

    def forward(self, ids):
        return self.bn(self.norm(self.second(self.first(self.embed(ids)).relu())).flatten(0, -2))


def rounded(scheme, dtype, **arguments):
    """(dense, compressed): a fifth of the weights is zero, of either sign."""
    dense = Net(dtype).eval()
    for linear in (dense.first, dense.second):
        linear.weight.data.view(-1)[::5] *= -0.0
    model, batches = copy.deepcopy(dense), [torch.arange(16).view(2, 8)]
    compress(model, QuantizationModifier(scheme=scheme, **arguments), batches)
    return dense, model


def assert_both_sides_are_equal(dense, model):
    before = codes(model)
    tensors, facts = through_files(named(model))
    assert set(facts["packed"]) == set(before)
    reader, settled = copy.deepcopy(dense), copy.deepcopy(model)
    from_tensors(named(reader), tensors, facts)
    settle(named(settled), tensors, facts)
    from_tensors(named(model), tensors, facts)
    assert_equal_bits(model, reader)
    assert_equal_bits(settled, reader)
    assert codes(model) == before
    return tensors, facts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", presets())
@pytest.mark.filterwarnings("ignore")
def test_every_preset_comes_back_bit_for_bit(scheme, dtype):
    dense, model = rounded(scheme, dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tensors, _ = assert_both_sides_are_equal(dense, model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())  # but for the sign of zeros
    assert "first.weight" not in tensors or tensors["first.weight"].element_size() == 1


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy", ["group", "channel", "tensor"])
def test_every_integer_grid_comes_back_bit_for_bit(symmetric, strategy):
    size = {"group_size": 32} if strategy == "group" else {}
    for number in range(2, 9):
        dtype = (torch.float32, torch.bfloat16, torch.float16)[number % 3]
        scheme = {"weights": {"num_bits": number, "symmetric": symmetric, "strategy": strategy, **size}}
        assert_both_sides_are_equal(*rounded(scheme, dtype, targets=["Linear", "Embedding"]))


def test_what_codes_do_not_hold_lies_beside_them():
    """A latent, an input scale of another dtype, a cache, a rotation: each comes back, and none is left on a module."""
    dense, model = rounded("W4A16", torch.bfloat16)
    record = Quantized.of(model.first)
    latent = model.first.weight.detach() + 0.001
    Quantized(record.scheme, record.scale, input_scale=torch.tensor([[0.1]]), latent=latent).attach(model.first)
    OnlineRotations((OnlineRotation("input", (1, -1, 1, 1)),)).attach(model.first)
    scales = torch.rand(4, 1, 1), torch.rand(1)
    QuantizedCache(QuantizationArgs(num_bits=8, type="float"), *scales).attach(model.norm)
    QuantizedCache(QuantizationArgs()).attach(dense.second)
    tensors, _ = assert_both_sides_are_equal(dense, model)
    assert bits(tensors["first._lightning_compress_quantized.latent"]) == bits(latent)


def test_a_weight_without_codes_is_stored_as_it_is():
    """A convolution, and a Linear whose weight was changed after rounding."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv1d(32, 8, 3), nn.Flatten(), nn.Linear(64, 8)).eval()
    model = copy.deepcopy(dense)
    compress(
        model,
        QuantizationModifier(scheme="W8A16", group_size=-1, targets=["Conv1d", "Linear"]),
        [torch.randn(2, 32, 10)],
    )
    model[2].weight.data[0, 0] += 1e-3
    tensors, facts = through_files(named(model))
    assert facts["packed"] == []
    from_tensors(named(dense), tensors, facts)
    assert_equal_bits(model, dense)
    assert bits(tensors["2.weight"]) == bits(model[2].weight)


@pytest.mark.parametrize("experts", [["0", "1", "2"], ["0"], []], ids=len)
def test_experts_are_stored_one_by_one(experts):
    """Their fused tensor is stored once, as slices: packed ones, and those that are dense."""
    from tests.export.test_experts import mixture

    dense, model = mixture("Qwen3Moe"), mixture("Qwen3Moe")
    split(dense), split(model)
    if experts:
        compress(
            model,
            QuantizationModifier(scheme="W4A16", targets=[f"re:.*experts.{e}[.].*" for e in experts], group_size=32),
        )
    split(model)
    block, again = model.model.layers[0], dense.model.layers[0]
    tensors, facts = through_files(named(block))
    assert len(facts["packed"]) == 3 * len(experts)
    assert not any(key.endswith(("experts.gate_up_proj", "experts.down_proj")) for key in tensors)
    from_tensors(named(again), tensors, facts)
    from_tensors(named(block), tensors, facts)
    assert_equal_bits(block, again)
    expert = named(block)["mlp.experts.0.up_proj"]  # alone, as an owner sends it
    with torch.no_grad():
        named(again)["mlp.experts.0.up_proj"].weight.zero_()
    from_tensors({"e": named(again)["mlp.experts.0.up_proj"]}, *through_files({"e": expert}))
    assert_equal_bits(block, again)


def test_shared_tensors_are_stored_once():
    def tied():
        model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
        model["b"].weight = model["a"].weight
        return model

    model, reader = tied(), tied()
    tensors, facts = through_files(named(model))
    assert sorted(tensors) == ["a.bias", "a.weight", "b.bias", "c.bias", "c.weight"]
    from_tensors(named(reader), tensors, facts)
    assert_equal_bits(model, reader)
    reader["b"].weight = nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(ValueError, match="'b.weight' shares its memory with another tensor in one of the two models"):
        from_tensors(named(reader), tensors, facts)


def test_parametrized_weights_and_modules_on_the_meta_device():
    dense, model = rounded("W8A16", torch.float32)
    tensors, facts = through_files(named(model))
    reader = copy.deepcopy(dense).to("meta")
    from_tensors(named(reader), tensors, facts)
    from_tensors(named(model), tensors, facts)
    assert_equal_bits(model, reader)
    masked = nn.utils.parametrizations.orthogonal(nn.Linear(4, 4))
    copied = copy.deepcopy(masked)
    nn.init.zeros_(copied.parametrizations.weight.original)
    from_tensors({"x": copied}, *through_files({"x": masked}))
    assert torch.equal(copied.weight, masked.weight)


def test_a_state_of_other_modules_is_refused():
    dense, model = rounded("W8A16", torch.float32)
    tensors, facts = through_files(named(model))

    def refused(message, modules=dense, tensors=tensors, facts=facts):
        with pytest.raises(ValueError, match=message):
            from_tensors(named(modules), tensors, facts)

    refused("there is a state of 'first', which is not among", nn.Linear(2, 2))
    refused("there is no tensor 'norm.bias'; expected", tensors={k: v for k, v in tensors.items() if k != "norm.bias"})
    refused("the tensor 'more' belongs to none", tensors=tensors | {"more": torch.ones(1)})
    refused(r"'norm.bias' is stored as torch.float32 \[1\], and the module has torch.float32 \[256\]",
            tensors=tensors | {"norm.bias": torch.ones(1)})  # fmt: skip
    other = {"first": {"unheard": {"fields": {}, "tensors": [], "in_codes": []}}}
    refused("'first' has a record 'unheard'", facts=facts | {"records": other})
