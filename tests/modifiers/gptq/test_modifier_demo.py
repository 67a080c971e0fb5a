"""GPTQ beside rounding to nearest on the demo's model and data: less lost in every module, by an H of its own."""

import copy

import pytest
import torch
from torch import nn

from examples.data_stdlib import StdlibBytes
from examples.model_llama import LlamaDemo
from lightning_compress import GPTQModifier, QuantizationModifier, compress

W = {"targets": ["Linear"], "group_size": 128}


@pytest.fixture(scope="module")
def demo():
    """The model, not trained, and its calibration data."""
    torch.manual_seed(0)
    parts = {"train_blocks": 1, "val_blocks": 1, "test_blocks": 1, "calibration_blocks": 16}
    data = StdlibBytes(block_length=64, batch_size=4, **parts)
    data.setup("fit")
    return LlamaDemo().model.eval(), [{"input_ids": b["input_ids"]} for b in data.calibration_dataloader()]


@torch.no_grad()
def moments(model: nn.Module, batches) -> dict[str, torch.Tensor]:
    """Sum of x x^T of every Linear in the dense model."""
    found: dict[str, torch.Tensor] = {}

    def add(name: str, x: torch.Tensor) -> None:
        rows = x.flatten(0, -2).double()
        found[name] = found.get(name, 0) + rows.t() @ rows

    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    handles = [m.register_forward_pre_hook(lambda _, args, n=n: add(n, args[0])) for n, m in linears.items()]
    for batch in batches:
        model(**batch)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("scale_search", ["minmax", "hessian"])
def test_every_module_loses_less_than_by_rounding(demo, bits, scale_search):
    dense, batches = demo
    H, errors = moments(dense, batches), {}
    for name, modifier in {
        "rtn": QuantizationModifier(scheme=f"W{bits}A16", **W),
        "gptq": GPTQModifier(scheme=f"W{bits}A16", scale_search=scale_search, **W),
    }.items():
        model = copy.deepcopy(dense)
        compress(model, modifier, batches, walk="whole")  # every module on inputs of the dense model, as H is
        errors[name] = {}
        for path, H_CC in H.items():
            D_RC = (dense.get_submodule(path).weight - model.get_submodule(path).weight).detach().double()
            errors[name][path] = float(((D_RC @ H_CC) * D_RC).sum())
    assert len(errors["rtn"]) == 2 * 7 + 1
    assert not [path for path, error in errors["gptq"].items() if not 0 < error < errors["rtn"][path]]
