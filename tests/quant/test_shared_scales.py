"""Weights that servers fuse share one global scale of NVFP4."""

import torch
from torch.testing import assert_close

from lightning_compress.quant.schemes import from_groups
from lightning_compress.quant.shared_scales import GlobalScales


def test_what_servers_fuse_shares_a_global_scale_and_nothing_else_does():
    names = ["a.q_proj", "a.k_proj", "a.v_proj", "a.o_proj", "b.q_proj"]
    modules = {name: torch.nn.Linear(32, 32) for name in names}
    for size, module in enumerate(modules.values(), 1):
        module.weight.data *= size
    (scheme,) = from_groups({"NVFP4A16": ["Linear"]})
    shared = GlobalScales(modules, dict.fromkeys(names, scheme))
    largest = max(modules[f"a.{n}_proj"].weight.abs().max() for n in "qkv")
    scale = shared.of("a.k_proj")
    assert_close(scale, 448 * 6 / largest.detach()[None])
    modules["a.q_proj"].weight.data *= 9  # kept: k is rounded by now
    assert shared.of("a.q_proj") is scale
    assert_close(shared.of("b.q_proj"), 448 * 6 / modules["b.q_proj"].weight.detach().abs().max()[None])
    assert shared.of("a.o_proj") != scale
    (plain,) = from_groups({"MXFP4A16": ["Linear"]})
    assert GlobalScales(modules, dict.fromkeys(names, plain)).of("a.q_proj") is None
