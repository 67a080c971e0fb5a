"""A block while its weights are learned: gradients as matrices, padding, what stays as it is."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_compress import AutoRoundModifier, compress
from lightning_compress.layers.expert import ExpertLinear
from lightning_compress.layers.matrix import as_matrix
from lightning_compress.modifiers.autoround.block import InputGrid, LearnedBlock
from lightning_compress.quant.record import Quantized
from lightning_compress.quant.schemes import from_groups
from tests.support.quantization_runs import correlated
from tests.support.smoothing_models import batches, build, targets


def groups(name: str, bits: int = 2, **weights) -> dict[str, Any]:
    return {"g": {"targets": targets(name), "weights": {"num_bits": bits, "group_size": 16, **weights}}}


@pytest.mark.parametrize("layer", ["Linear", "Conv1d", "Conv1D"])
def test_gradients_are_those_of_the_weight_as_a_matrix(layer):
    """Against differences of the error, weight by weight."""
    module: nn.Module = {"Linear": lambda: nn.Linear(4, 3), "Conv1d": lambda: nn.Conv1d(4, 3, 2)}.get(layer, conv1d)()
    x = torch.randn(2, 4, 5) if layer == "Conv1d" else torch.randn(2, 5, 4)
    target = torch.randn_like(module(x))
    block = LearnedBlock({"m": module}, lambda i: module(x).tanh(), lambda: None, 1, lambda i: target)
    with torch.no_grad(), block.learning(module, {}):
        block.error(0)
        with torch.enable_grad():
            error = block.error(0)
        found = block.gradients(error)["m"]
        W_RC = as_matrix(module)
        unit = target.numel() / block.power
        for r, c in [(0, 0), (2, 3), (1, W_RC.shape[1] - 1)]:
            kept, ends = float(W_RC[r, c]), []
            for step in (1e-2, -1e-2):
                W_RC[r, c] = kept + step
                ends.append(float(block.error(0)))
            W_RC[r, c] = kept
            assert float(found[r, c]) == pytest.approx(unit * (ends[0] - ends[1]) / 2e-2, rel=2e-2, abs=1e-3)


def test_experts_in_one_tensor_are_learned_each_by_its_slice():
    """Gradients of two slices are those of the tensor; what is placed in one leaves the other as it is."""
    home = nn.Module()
    home.fused = nn.Parameter(torch.randn(2, 6, 4))
    experts = {"a": ExpertLinear(home, "fused", 0, (0, 3)), "b": ExpertLinear(home, "fused", 1, (3, 6))}
    x = torch.randn(5, 4)
    block = LearnedBlock(experts, lambda i: experts["a"](x) * experts["b"](x), lambda: None, 1, lambda i: x[:, :3])
    with torch.no_grad(), block.learning(home, {}):
        block.error(0)
        with torch.enable_grad():
            error = block.error(0)
        found = block.gradients(error)
    y, z = (expert(x).detach() for expert in experts.values())
    scale = 2 * 15 / block.power
    assert_close(found["a"], scale * ((y * z - x[:, :3]) * z).t() @ x)
    assert_close(found["b"], scale * ((y * z - x[:, :3]) * y).t() @ x)


def conv1d() -> nn.Module:
    return pytest.importorskip("transformers").pytorch_utils.Conv1D(3, 4)


def test_quantized_inputs_let_the_gradient_through():
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    x = correlated(6, 8)
    block = LearnedBlock({"a": first, "b": second}, lambda i: second(first(x)), lambda: None, 1, lambda i: x)
    args = from_groups({"g": {"targets": ["Linear"], "weights": {"num_bits": 8}, "input_activations": {
        "num_bits": 4, "dynamic": True, "strategy": "token",
    }}})[0].input_activations  # fmt: skip
    with torch.no_grad():
        plain = float(block.error(0))
        with block.learning(nn.Sequential(first, second), {"a": InputGrid(args), "b": InputGrid(args)}):
            with torch.enable_grad():
                error = block.error(0)
            assert float(error) != plain
            found = block.gradients(error)
        assert float(block.error(0)) == plain  # the hooks are off again
    assert all(gradient.abs().sum() > 0 for gradient in found.values())


def test_padding_does_not_count():
    data = batches("llama")
    other = copy.deepcopy(data)
    assert (other[1]["attention_mask"] == 0).any()
    other[1]["input_ids"][other[1]["attention_mask"] == 0] = 40
    models = [build("llama"), build("llama")]
    for model, batch in zip(models, (data, other), strict=True):
        compress(model, AutoRoundModifier(config_groups=groups("llama"), ignore=["lm_head"], iters=6), batch)
    for name, (module, _) in Quantized.find(models[0]).items():
        assert_close(module.weight, models[1].get_submodule(name).weight)


def test_the_rest_of_the_model_stays_as_it_is():
    model = build("llama").requires_grad_(True)
    model.model.embed_tokens.weight.requires_grad_(False)
    before, keys = copy.deepcopy(model), list(model.state_dict())
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
    compress(model, AutoRoundModifier(config_groups=groups("llama"), ignore=["lm_head"], iters=4), batches("llama"))
    assert list(model.state_dict()) == keys
    learned = {f"{name}.weight" for name in Quantized.find(model)}
    for (name, new), old in zip(model.named_parameters(), before.parameters(), strict=True):
        assert new.grad is None
        assert new.requires_grad == old.requires_grad
        assert torch.equal(new, old) == (name not in learned)
    assert sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()) == hooks


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).detach()


def test_a_block_without_gradient_is_named():
    with pytest.raises(ValueError, match=r"no gradient of the block's output reaches '0.fc': is there a"):
        compress(
            nn.Sequential(Detached(), Detached()), AutoRoundModifier(config_groups=groups("gelu")), batches("gelu")
        )
