"""One to four processes calibrate together: results are equal bit for bit, and an error on one reaches all."""

import hashlib
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import (
    AutoRoundModifier,
    GPTQModifier,
    QuantizationModifier,
    SparseGPTModifier,
    WandaPruningModifier,
    compress,
    save,
)
from lightning_compress.core import Modifier
from lightning_compress.team import RankError, Team
from tests.support.processes import run_processes, vanish

COLUMNS = 48


class Block(nn.Module):
    """Query, key and value share an input; its columns differ by decades, as those of real models do."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(COLUMNS, 32) for _ in range(3))
        self.o = nn.Linear(32, COLUMNS)
        self.scale = nn.Parameter(torch.randn(COLUMNS).exp())

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.layer_norm(x, (COLUMNS,)) * self.scale
        return x + self.o(torch.tanh(self.q(y)) * torch.sigmoid(self.k(y)) + self.v(y))


class Net(nn.Module):
    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(COLUMNS, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 20, COLUMNS, generator=generator) for _ in range(count)]


W4 = {"scheme": "W4A16", "group_size": 16, "ignore": ["head"]}
RECIPES: dict[str, Callable[[], list[Modifier]]] = {
    "gptq": lambda: [GPTQModifier(**W4)],
    "gptq choosing on held-out batches": lambda: [GPTQModifier(**W4, dampening_frac="auto", refine=True)],
    "gptq, targets of the dense model": lambda: [GPTQModifier(**W4, target="dense")],
    "gptq, static inputs": lambda: [GPTQModifier(config_groups=STATIC)],
    "rtn, static inputs, moving average": lambda: [
        QuantizationModifier(config_groups=STATIC, observer="moving_average")
    ],
    "rtn, static inputs, histogram": lambda: [QuantizationModifier(config_groups=STATIC, observer="histogram")],
    "rtn by squares of inputs": lambda: [QuantizationModifier(**W4, scale_search="imatrix")],
    "rtn by Hessians": lambda: [QuantizationModifier(**W4, scale_search="hessian")],
    "sparsegpt": lambda: [SparseGPTModifier(sparsity=0.5)],
    "sparsegpt, shares by outliers": lambda: [SparseGPTModifier(sparsity=0.5, sparsity_profile="owl")],
    "wanda": lambda: [WandaPruningModifier(mask_structure="2:4", refit_iterations=3)],
    "wanda, then gptq": lambda: [WandaPruningModifier(sparsity=0.5), GPTQModifier(**W4)],
}
STATIC: dict[str, Any] = {
    "all": {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, "type": "int", "strategy": "channel"},
        "input_activations": {"num_bits": 8, "type": "int", "strategy": "tensor", "symmetric": False, "dynamic": False},
    }
}


def outcome(_: int, recipe: str, count: int, folder: Path) -> tuple[str, list[dict[str, Any]]]:
    """The hash of the exported weights, and the ledger without seconds."""
    model, team = Net(), Team.of_processes()
    ledger = compress(model, RECIPES[recipe](), batches(count), team=team)
    target = save(model, folder / f"{team.size}-{team.rank}")
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in ledger.state_dict()]
    return hashlib.sha256((target / "model.safetensors").read_bytes()).hexdigest(), rows


@pytest.mark.parametrize("recipe", RECIPES)
def test_any_number_of_ranks_gives_the_bits_of_one(recipe: str, tmp_path: Path) -> None:
    work = partial(outcome, recipe=recipe, count=7, folder=tmp_path)
    [alone] = run_processes(work, tmp_path / "1", 1)
    for size in (2, 3, 4):
        ends = run_processes(work, tmp_path / str(size), size)
        assert [end[0] for end in ends] == [alone[0]] * size
        assert all(end[1] == alone[1] for end in ends)


def test_more_ranks_than_batches(tmp_path: Path) -> None:
    work = partial(outcome, recipe="gptq", count=3, folder=tmp_path)
    [alone] = run_processes(work, tmp_path / "one", 1)
    assert run_processes(work, tmp_path / "four", 4) == [alone] * 4


class Experts(nn.Module):
    """Each sample goes to one expert, that of its first number; two layers of an expert receive the same tensor."""

    def __init__(self, reverse_on: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        for e in range(4):  # not in a ModuleList, whose modules would be blocks
            for name, size in (("gate", (8, 16)), ("up", (8, 16)), ("down", (16, 8))):
                self.add_module(f"{name}{e}", nn.Linear(*size))
        self.reverse_on = reverse_on

    def forward(self, x: Tensor) -> Tensor:
        expert_N = x[:, 0].abs().long() % 4
        out = torch.zeros_like(x)
        order = range(4) if float(x[0, 1]) < self.reverse_on else range(3, -1, -1)
        for e in order:
            if (at := (expert_N == e).nonzero().flatten()).numel():
                gate, up, down = (self.get_submodule(f"{name}{e}") for name in ("gate", "up", "down"))
                token = x[at]
                out[at] = down(torch.sigmoid(gate(token)) * up(token))
        return out


def routed(*experts: tuple[int, ...]) -> list[Tensor]:
    """A batch of 12 samples for each tuple, which names the experts that they go to."""
    generator = torch.Generator().manual_seed(2)
    made = []
    for choice in experts:
        x = torch.randn(12, 8, generator=generator)
        x[:, 0] = torch.tensor([choice[i % len(choice)] for i in range(12)]) + 0.25
        made.append(x)
    return made


def calibrate_experts(
    _: int, reverse_on: float, data: list[Tensor], walk: str
) -> tuple[dict[str, list[float]], list[dict[str, Any]]] | str:
    warnings.simplefilter("ignore")
    try:
        model, gptq = Experts(reverse_on), GPTQModifier(scheme="W4A16", group_size=8)
        ledger = compress(model, gptq, data, team=Team.of_processes(), walk=walk)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in ledger.state_dict()]
    return {name: value.flatten().tolist() for name, value in model.state_dict().items()}, rows


@pytest.mark.parametrize("walk", ["auto", "one_pass", "whole"])
def test_an_expert_may_get_no_token_on_some_ranks_or_on_all(tmp_path: Path, walk: str) -> None:
    data = routed((0, 1, 2), (0, 2), (1, 2), (2,), (0,))  # none for expert 3; rank 1 of 2 sees 0 and 2 alone
    work = partial(calibrate_experts, reverse_on=1e9, data=data, walk=walk)
    [alone] = run_processes(work, tmp_path / "1", 1)
    assert not isinstance(alone, str)
    assert any("never saw data" in flag for row in alone[1] for flag in row["flags"])
    for size in (2, 3):
        assert run_processes(work, tmp_path / str(size), size) == [alone] * size


def test_an_order_that_depends_on_the_data_is_right_or_an_error_that_names_the_module(tmp_path: Path) -> None:
    data = routed((0, 1, 2, 3), (0, 1, 2, 3), (3, 0), (0, 1, 2, 3))
    data[3][0, 1], data[0][0, 1] = 50.0, 0.0
    work = partial(calibrate_experts, reverse_on=20.0, data=data, walk="one_pass")
    [alone] = run_processes(work, tmp_path / "1", 1)
    ends = run_processes(work, tmp_path / "2")
    assert isinstance(alone, str)
    assert "batch 3 comes to" in alone
    assert all("batch 3 comes to" in end and "walk='two_pass'" in end for end in ends)
    assert [end.partition(":")[0] for end in ends] == ["RankError", "ValueError"]


def failing(rank: int) -> tuple[str, str] | None:
    data = batches(6)
    data[3][0, 0, 0] = torch.nan  # of rank 1
    try:
        compress(Net(), GPTQModifier(**W4), data, team=Team.of_processes())
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def test_an_error_on_one_rank_is_raised_on_all_and_names_batch_and_module(tmp_path: Path) -> None:
    first, second, third = run_processes(failing, tmp_path, 3)
    assert first[0] == "ValueError"  # batch 3 of 3 ranks is of rank 0
    assert "for calibration batch 3" in first[1]
    for other in (second, third):
        assert other[0] == "RankError"
        assert "failed on rank 0: ValueError: NaN in the input of" in other[1]


def dying(rank: int) -> str | None:
    team = Team.of_processes()
    model = Net()
    if rank == 1:
        model.blocks[1].o.register_forward_pre_hook(lambda *_: vanish())
    try:
        compress(model, GPTQModifier(**W4), batches(6), team=team)
    except RankError as error:
        return str(error)
    return None


def test_a_rank_that_dies_is_named_by_the_others(tmp_path: Path) -> None:
    first, second, third = run_processes(dying, tmp_path, 3)
    assert second is None
    for message in (first, third):
        assert "rank 1: it has ended" in message


def test_a_modifier_that_must_see_all_batches_says_so() -> None:
    with pytest.raises(ValueError, match="AutoRoundModifier must see all batches, and cannot calibrate in a team of 2"):
        compress(Net(), AutoRoundModifier(**W4), batches(2), team=Team(0, 2))
