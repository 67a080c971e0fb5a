"""Large layers in fixed pieces of rows: equal bits for any number of ranks, and errors that reach all."""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import GPTQModifier, SparseGPTModifier, WandaPruningModifier, compress
from lightning_compress.core import Modifier
from lightning_compress.layerwise import modifier, owners, pieces
from lightning_compress.layerwise.layer import Layer, Solved
from lightning_compress.layerwise.pieces import collect, cut
from lightning_compress.quant.record import Quantized
from lightning_compress.team import Team
from tests.layerwise.test_owners import STATIC, W4, Net, batches
from tests.support.processes import run_processes, vanish


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("rows", [(5,), (2047,), (4096,), (9000, 1000, 1000), (2000, 100, 2100, 28672)], ids=str)
def test_pieces_hold_each_row_once_and_are_never_small(rows: tuple[int, ...], device: str) -> None:
    smallest = 2048 if device == "cpu" else 8192
    parts = cut(rows, device)
    for i, R in enumerate(rows):
        numbers = [r for piece in parts for j, part in piece if i == j for r in range(part.start, part.stop)]
        assert numbers == list(range(R))
    sizes = [sum(part.stop - part.start for _, part in piece) for piece in parts]
    assert len(sizes) == max(1, sum(rows) // smallest)
    assert max(sizes) - min(sizes) < 64 * len(sizes)


RECIPES: dict[str, Callable[[], list[Modifier]]] = {
    "gptq": lambda: [GPTQModifier(**W4)],
    "gptq at 2 bits, keeping zeros and latents": lambda: [
        GPTQModifier(config_groups=TWO_BITS, preserve_zeros=True, keep_latents=True)
    ],
    "gptq choosing on held-out batches": lambda: [GPTQModifier(**W4, dampening_frac="auto", refine=True)],
    "gptq, targets of the dense model": lambda: [GPTQModifier(**W4, target="dense")],
    "gptq, NVFP4": lambda: [GPTQModifier(scheme="NVFP4A16")],
    "gptq, one scale for a tensor": lambda: [GPTQModifier(config_groups=PER_TENSOR)],
    "sparsegpt 2:4": lambda: [SparseGPTModifier(mask_structure="2:4")],
    "sparsegpt, all rows together": lambda: [SparseGPTModifier(sparsity=0.5)],
    "wanda, refitted": lambda: [WandaPruningModifier(sparsity=0.5, refit_iterations=3)],
}
TWO_BITS = {"all": {"targets": ["Linear"], "weights": {"num_bits": 2, "type": "int", "strategy": "channel"}}}
PER_TENSOR = {"all": {**STATIC["all"], "weights": {"num_bits": 8, "type": "int", "strategy": "tensor"}}}
ONE_PASS = ("gptq", "gptq, NVFP4", "sparsegpt 2:4")
TOGETHER = ("gptq, one scale for a tensor", "sparsegpt, all rows together")  # these are not cut


class Gated(nn.Module):
    """An MLP whose first two layers share a global scale in NVFP4: that of the first, whose rounding moves it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(48, 32), nn.Linear(48, 32), nn.Linear(32, 48)
        self.gate_proj.weight.data.normal_()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(torch.sigmoid(self.gate_proj(x)) * self.up_proj(x))


def in_small_pieces() -> list[Sequence[int]]:
    """Cut layers of this process into 16 to 31 rows, whatever the work; returns the ranks of each layer's pieces."""
    pieces.ROWS["cpu"], pieces.ALIGNED, owners.WORTH["cpu"] = 16, 1, 0.0
    dealt: list[Sequence[int]] = []

    def noted(team: Team, owner: int, ranks: Sequence[int], *others: Any) -> list[Any]:
        dealt.append(ranks)
        return collect(team, owner, ranks, *others)

    modifier.collect = noted  # type: ignore[attr-defined]
    return dealt


def outcome(_: int, recipe: str, walk: str) -> tuple[str, list[dict[str, Any]], list[Sequence[int]]]:
    """The hash of the weights, the ledger without seconds, and which ranks solved each layer."""
    dealt, team = in_small_pieces(), Team.of_processes()
    model = Gated() if recipe == "gptq, NVFP4" else Net(2)
    ledger = compress(model, RECIPES[recipe](), batches(4), team=team, walk=walk)
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in ledger.state_dict()]
    records = [record for module in model.modules() if (record := Quantized.of(module))]
    tensors = [*model.state_dict().values(), *[t for one in records for t in (one.scale, one.latent) if t is not None]]
    values = ((tensor.detach() + 0.0).numpy().tobytes() for tensor in tensors)  # codes hold no sign of zeros
    return hashlib.sha256(b"".join(values)).hexdigest(), rows, dealt


@pytest.mark.parametrize("recipe", RECIPES)
def test_any_number_of_ranks_gives_the_bits_of_one(recipe: str, tmp_path: Path) -> None:
    work = partial(outcome, recipe=recipe, walk="one_pass" if recipe in ONE_PASS else "two_pass")
    [alone] = run_processes(work, tmp_path / "1", 1)
    for size in (2, 3) if recipe != "gptq, NVFP4" else (4,):  # a rank that had no piece of the first layer
        ends = run_processes(work, tmp_path / str(size), size)
        assert [end[:2] for end in ends] == [alone[:2]] * size
        dealt = ends[0][2]
        assert all(end[2] == dealt for end in ends)
        assert bool(dealt) == (recipe not in TOGETHER)
        for ranks in dealt:
            assert max(map(ranks.count, range(size))) - min(map(ranks.count, range(size))) <= 1


def failing(rank: int, end: bool) -> str | None:
    """Rank 1 fails, or ends, in its first piece."""
    in_small_pieces()
    team, solve = Team.of_processes(), SparseGPTModifier.solve

    def fail(self: SparseGPTModifier, layer: Layer, prepared: Any) -> Solved:
        if rank == 1:
            vanish() if end else None
            raise ValueError(f"no solution for {layer.name}")
        return solve(self, layer, prepared)

    SparseGPTModifier.solve = fail  # type: ignore[method-assign]
    try:
        compress(Net(2), SparseGPTModifier(mask_structure="2:4"), batches(4), team=team)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_an_error_in_a_piece_is_raised_on_all_with_rank_and_module(tmp_path: Path) -> None:
    first, second, third = run_processes(partial(failing, end=False), tmp_path, 3)
    assert second == "ValueError: no solution for blocks.0.q"
    message = f"SparseGPTModifier of blocks.0.q failed on rank 1: {second}"
    assert first == third == f"RankError: {message}"


def test_a_rank_that_ends_in_a_piece_is_named_by_the_others(tmp_path: Path) -> None:
    first, second, third = run_processes(partial(failing, end=True), tmp_path, 3)
    assert second is None
    assert "SparseGPTModifier of blocks.0.q failed on rank 1: it has ended" in first
    assert first == third


def test_rows_of_pieces_are_those_of_the_layer_solved_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for make in (RECIPES[name] for name in RECIPES if name not in TOGETHER):
        weights = []
        for rows in (16, 2048):
            monkeypatch.setitem(pieces.ROWS, "cpu", rows)
            monkeypatch.setattr(pieces, "ALIGNED", 16)
            model = Net(1)
            compress(model, make(), batches(4))
            weights.append(torch.cat([p.flatten() for p in model.blocks[0].parameters()]))
        assert (weights[0] != weights[1]).float().mean() < 0.01
