"""Candidates, groups of modules that must be equal, and bytes against what is really stored."""

import pytest
import torch
from torch import nn

from lightning_compress import QuantizationModifier, compress
from lightning_compress.modifiers.allocate.options import groups_of, parse_candidates, stored
from lightning_compress.quant.packing import pack
from lightning_compress.quant.record import Quantized
from lightning_compress.quant.schemes import describe

FORMATS = [
    "W2A16",
    "W3A16 g32",
    "W4A16_ASYM g16",
    "W8A16 channel",
    "W8A8",
    "FP8_DYNAMIC",
    "FP8_BLOCK",
    "MXFP4A16",
    "NVFP4A16",
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("candidate", FORMATS)
def test_bytes_are_those_of_the_tensors_on_disk(candidate, dtype):
    model = nn.Sequential(nn.Linear(256, 40, bias=False)).to(dtype)
    (group,) = groups_of({"0": model[0]}, parse_candidates([candidate, "dense"], "auto")[:1], on_disk=True)
    scheme = group.schemes[0]["0"]
    ledger = compress(model, QuantizationModifier(config_groups={"all": scheme}))
    record = Quantized.of(model[0])
    assert record is not None
    tensors = pack("0", model[0], record)
    assert group.sizes == [sum(tensor.nbytes for tensor in tensors.values())]
    assert group.sizes == [ledger.rows[0].bytes_after]


def test_names_of_candidates():
    texts = ["W4A16", "W4A16 g64", "W8A16 channel", {"weights": {"num_bits": 3, "group_size": 32}}, "dense", "NVFP4A16"]
    schemes = parse_candidates(texts, 16)
    assert [scheme and describe(scheme) for scheme in schemes] == [
        "W4A16 g16 sym", "W4A16 g64 sym", "W8A16 channel sym", "W3A16 g32 sym", None, "NVFP4A16 g16",
    ]  # fmt: skip


def names_of(groups):
    return [sorted(group.modules) for group in groups]


def test_what_servers_fuse_is_one_group():
    names = [f"layers.0.attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    names += [f"layers.0.mlp.experts.{i}.{name}" for i in (0, 1) for name in ("w1", "w2", "w3")]
    names += ["layers.0.mlp.shared_expert.gate_proj", "layers.0.mlp.shared_expert.up_proj", "q_proj", "head"]
    groups = groups_of({name: nn.Linear(32, 8) for name in names}, parse_candidates(["W4A16"], 32), on_disk=False)
    assert names_of(groups) == [sorted(names[:3]), names[3:4], sorted(names[4:10]), names[10:12], ["q_proj"], ["head"]]


def test_candidates_that_do_not_fit_are_left_out():
    modules = {"q_proj": nn.Linear(96, 8), "k_proj": nn.Linear(48, 8), "other": nn.Linear(96, 8)}
    groups = groups_of(modules, parse_candidates(["W4A16 g32", "W8A16 channel"], 32), on_disk=False)
    assert [len(group.sizes) for group in groups] == [1, 2]
    with pytest.raises(
        ValueError, match=r"no group size of the candidates divides the input columns of 'q_proj' \(96\)"
    ):
        groups_of(modules, parse_candidates(["W4A16 g32"], 32), on_disk=False)


def test_convolutions_stay_dense_on_disk():
    (scheme,) = parse_candidates(["W8A16 channel"], "auto")
    module = nn.Conv2d(4, 6, 3)
    assert stored(scheme, module, on_disk=True) == stored(None, module, on_disk=False) == 4 * 6 * 4 * 9
    assert stored(scheme, module, on_disk=False) < 300
