"""Modifiers that calibrate on several ranks: the weights, the records and the ledger are those of one process."""

import hashlib
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import (
    AllocateModifier,
    AutoRoundModifier,
    AWQModifier,
    DepthPruningModifier,
    GPTQModifier,
    KVCacheModifier,
    LogarithmicEqualizationModifier,
    QuantizationModifier,
    REAPModifier,
    RotationModifier,
    SmoothQuantModifier,
    SparseGPTModifier,
    StructuredPruningModifier,
    TuneModifier,
    WandaPruningModifier,
    compress,
)
from lightning_compress.calibration.block_passes import BlockPasses, ModuleGroup
from lightning_compress.core import Ledger, Modifier
from lightning_compress.quant.kv_cache import QuantizedCache
from lightning_compress.quant.record import Quantized
from lightning_compress.team import RankError, Team
from tests.support.architecture_models import ARCHITECTURES
from tests.support.processes import run_processes
from tests.support.smoothing_models import build

FORMS: dict[str, dict[str, Any]] = {
    "W4": {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8}},
    "W8A8": {
        "weights": {"num_bits": 8, "type": "int", "strategy": "channel"},
        "input_activations": {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False},
    },
}

FP8 = {
    "weights": {"num_bits": 8, "type": "float", "strategy": "tensor"},
    "input_activations": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False},
}
TABLE = {"weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}


def on_linears(form: str) -> dict[str, Any]:
    return {"config_groups": {"all": {"targets": ["Linear"], **FORMS[form]}}, "ignore": ["lm_head"]}


Recipe = Callable[[], Sequence[Modifier]]
RECIPES: dict[str, tuple[str, Recipe]] = {
    "smoothquant, then gptq": ("llama", lambda: [SmoothQuantModifier(), GPTQModifier(**on_linears("W8A8"))]),
    "smoothquant of experts": ("mixture", lambda: [SmoothQuantModifier()]),
    "logarithmic equalization": (
        "llama",
        lambda: [LogarithmicEqualizationModifier(), QuantizationModifier(**on_linears("W8A8"), observer="percentile")],
    ),
    "allocate, then gptq": (
        "llama",
        lambda: [
            AllocateModifier(bits=5.5, candidates=["W3A16", "W4A16", "W8A16"], group_size=16),
            GPTQModifier(scheme="allocated", ignore=["lm_head"]),
        ],
    ),
    "nvfp4": ("llama", lambda: [GPTQModifier(scheme="NVFP4", ignore=["lm_head"])]),
    "fp8, with embeddings": (
        "llama",
        lambda: [
            SmoothQuantModifier(),
            QuantizationModifier(
                config_groups={"fp8": {"targets": ["Linear"], **FP8}, "table": {"targets": ["Embedding"], **TABLE}},
                ignore=["lm_head"],
            ),
        ],
    ),
    "awq": ("llama", lambda: [AWQModifier(**on_linears("W4"), n_grid=8)]),
    "awq, layer by layer, clipped": (
        "llama",
        lambda: [AWQModifier(**on_linears("W4"), n_grid=8, loss="layer", clip=True)],
    ),
    "awq, then gptq": (
        "gpt2",
        lambda: [
            AWQModifier(targets=["Conv1D"], scheme="W4A16", group_size=8, ignore=["lm_head"], n_grid=6, quantize=False),
            GPTQModifier(targets=["Conv1D"], scheme="W4A16", group_size=8, ignore=["lm_head"]),
        ],
    ),
    "awq by the loss": ("llama", lambda: [AWQModifier(**on_linears("W4"), n_grid=8, objective="loss")]),
    "awq of experts": ("mixture", lambda: [AWQModifier(**on_linears("W4"), n_grid=6)]),
    "kv cache": ("llama", lambda: [KVCacheModifier(format="int8", strategy="head", symmetric=False)]),
    "kv cache by moving averages": ("llama", lambda: [KVCacheModifier(observer="moving_average")]),
    "kv cache by token": ("llama", lambda: [KVCacheModifier(strategy="token"), GPTQModifier(**on_linears("W4"))]),
    "rotation": ("llama", lambda: [RotationModifier(), QuantizationModifier(**on_linears("W4"))]),
    "reap": ("mixtral", lambda: [REAPModifier(sparsity=0.25)]),
    "depth": ("llama", lambda: [DepthPruningModifier(count=1)]),
    "gptq by the loss": ("llama", lambda: [GPTQModifier(**on_linears("W4"), objective="loss")]),
    "gptq by the user's loss": ("llama", lambda: [GPTQModifier(**on_linears("W4"), objective="training_step")]),
    "rtn by the loss": (
        "llama",
        lambda: [QuantizationModifier(**on_linears("W4"), scale_search="imatrix", objective="loss")],
    ),
    "wanda, shares by the loss": (
        "mixtral",
        lambda: [WandaPruningModifier(sparsity=0.5, sparsity_profile="loss", objective="loss", ignore=["lm_head"])],
    ),
    "gptq, then tune": ("llama", lambda: [GPTQModifier(**on_linears("W4")), TuneModifier(epochs=1, accumulate=2)]),
    "width": ("llama", lambda: [StructuredPruningModifier(ratio=0.5, importance="activation", dimension="mlp")]),
}


BATCHES = {2: 5, 3: 5, 4: 2}  # by the number of ranks: two of four have none
Outcome = tuple[dict[str, str], list[dict[str, Any]]]


def data(model: nn.Module, count: int) -> list[Any]:
    """Batches of several rungs of AWQ; half of each but the first is padding, or all of it goes to one expert."""
    generator = torch.Generator().manual_seed(1)
    if isinstance(model, nn.Sequential):
        W_EC = model[0].mixture.router.weight.detach()
        noise = [0.2 * torch.randn(4, 200 + i, 32, generator=generator) for i in range(count)]
        return [x + 20 * W_EC[i % 3] / W_EC[i % 3].norm() for i, x in enumerate(noise)]  # none for expert 3
    batches = []
    for i in range(count):
        ids = torch.randint(3, 48, (24, 26 + i), generator=generator)
        mask = torch.ones_like(ids)
        mask[12:, : (13 if i else 0)] = 0
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Weights and records; zeros without signs, which packed codes do not hold."""
    tensors = dict(model.state_dict())
    for kind in (Quantized, QuantizedCache):
        for name, (_, record) in kind.find(model).items():
            tensors |= {f"{name}.{key}": v for key, v in vars(record).items() if isinstance(v, Tensor)}
    return {name: (tensor.double() + 0).contiguous() for name, tensor in tensors.items()}


def outcome(recipe: str, count: int) -> Outcome:
    architecture, modifiers = RECIPES[recipe]
    model = ARCHITECTURES["mixtral"].build() if recipe == "reap" else build(architecture)
    loss = user_loss if "user" in recipe else None
    ledger = compress(model, modifiers(), data(model, count), team=Team.of_processes(), loss=loss)
    return facts(model, ledger)


def user_loss(model: nn.Module, batch: Any) -> Tensor:
    """It skips a batch, and its labels are those of the batch."""
    return None if batch["input_ids"].shape[1] == 27 else model(**batch, labels=batch["input_ids"]).loss  # type: ignore


def facts(model: nn.Module, ledger: Ledger) -> Outcome:
    """A hash of each tensor, and the ledger without seconds."""
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in ledger.state_dict()]
    hashes = {n: hashlib.sha256(t.numpy().tobytes()).hexdigest() for n, t in tensors_of(model).items()}
    return hashes, rows


def outcomes(rank: int, count: int) -> dict[str, Outcome]:
    warnings.simplefilter("ignore")
    return {recipe: outcome(recipe, count) for recipe in RECIPES}


Runs = Callable[[int, int], list[dict[str, Outcome]]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Outcomes of all recipes, for each rank, by the numbers of ranks and of batches."""
    folder = tmp_path_factory.mktemp("ranks")
    return cache(lambda n, count: run_processes(partial(outcomes, count=count), folder / f"{n}-{count}", n))


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.slow), 3, 4])
@pytest.mark.parametrize("recipe", RECIPES)
def test_any_number_of_ranks_gives_the_bits_of_one(recipe: str, ranks: int, runs: Runs) -> None:
    count = BATCHES[ranks]
    [alone] = runs(1, count)
    assert alone[recipe][1]
    assert [end[recipe] for end in runs(ranks, count)] == [alone[recipe]] * ranks


def broken_off(rank: int, folder: Path) -> tuple[Outcome, Outcome]:
    """REAP in one go, and broken off after the first block and continued."""
    warnings.simplefilter("ignore")

    def stop(text: str, blocks: int, of: int) -> None:
        if blocks == 1:
            raise KeyboardInterrupt

    def prune(**arguments: Any) -> Outcome:
        model = ARCHITECTURES["mixtral"].build()
        return facts(model, compress(model, REAPModifier(), data(model, 5), team=Team.of_processes(), **arguments))

    with pytest.raises((KeyboardInterrupt, RankError)):
        prune(log=folder, progress=stop)
    return prune(), prune(log=folder, resume="must")


def test_saliencies_of_a_log_are_those_of_all_ranks(tmp_path: Path) -> None:
    for whole, continued in run_processes(partial(broken_off, folder=tmp_path / "log"), tmp_path / "2"):
        assert whole == continued


def by_the_loss() -> list[Modifier]:
    return [SparseGPTModifier(objective="loss", sparsity_profile="owl", ignore=["lm_head"], sparsity=0.5)]


def surveyed(rank: int, folder: Path) -> None:
    """A run that ends as the walk begins."""
    warnings.simplefilter("ignore")

    def stop(text: str, blocks: int, of: int) -> None:
        if text.startswith("probe"):
            raise KeyboardInterrupt

    model = build("llama")
    with pytest.raises((KeyboardInterrupt, RankError)):
        compress(model, by_the_loss(), data(model, 5), team=Team.of_processes(), log=folder, progress=stop)


def after_survey(rank: int, folder: Path) -> Outcome:
    """The rest of it; a second survey is an error."""
    warnings.simplefilter("ignore")

    def check(text: str, blocks: int, of: int) -> None:
        assert not text.startswith("survey")

    model = build("llama")
    arguments: dict[str, Any] = {"team": Team.of_processes(), "log": folder, "resume": "must", "progress": check}
    return facts(model, compress(model, by_the_loss(), data(model, 5), **arguments))


@pytest.mark.parametrize(("before", "after"), [(2, 3), pytest.param(3, 1, marks=pytest.mark.slow)])
def test_any_number_of_ranks_goes_on_from_a_survey(tmp_path: Path, before: int, after: int) -> None:
    warnings.simplefilter("ignore")
    model = build("llama")
    unbroken = facts(model, compress(model, by_the_loss(), data(model, 5), log=tmp_path / "unbroken"))
    run_processes(partial(surveyed, folder=tmp_path / "log"), tmp_path / "before", before)
    ends = run_processes(partial(after_survey, folder=tmp_path / "log"), tmp_path / "after", after)
    assert ends == [unbroken] * after


def following(rank: int) -> tuple[Outcome, int]:
    """SmoothQuant as where blocks are sharded, and how often this rank ran a block again."""
    runs: list[int] = []
    replay = BlockPasses._replay

    def counted(self: BlockPasses, group: ModuleGroup, run: Callable[[int], object], batch: int) -> object:
        runs.append(batch)
        return replay(self, group, run, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_compress.modifiers.smoothing.modifier.is_sharded", lambda model: True)
        patch.setattr(BlockPasses, "_replay", counted)
        return outcome("smoothquant, then gptq", 4), len(runs)


def test_where_blocks_are_sharded_all_ranks_run_them_again_together(tmp_path: Path) -> None:
    [alone] = run_processes(following, tmp_path / "1", 1)
    assert alone[1] > 10
    assert run_processes(following, tmp_path / "2") == [alone] * 2


W4: dict[str, Any] = {"scheme": "W4A16"}
TEAMS: list[tuple[Modifier, str]] = [
    (QuantizationModifier(**W4), "sums"),
    (GPTQModifier(**W4), "sums"),
    (AWQModifier(**W4), "sums"),
    (AllocateModifier(bits=4.5), "sums"),
    (AutoRoundModifier(**W4), "alone"),
    (SmoothQuantModifier(), "sums"),
    (LogarithmicEqualizationModifier(), "sums"),
    (SparseGPTModifier(sparsity_profile="owl"), "sums"),
    (WandaPruningModifier(), "sums"),
    (WandaPruningModifier(regional_gradient=100.0), "alone"),
    (WandaPruningModifier(regional_rounds=5), "alone"),
    (KVCacheModifier(), "sums"),
    (KVCacheModifier(strategy="token"), "weights"),
    (REAPModifier(), "sums"),
    (RotationModifier(), "weights"),
    (RotationModifier(learn=True), "alone"),
    (DepthPruningModifier(count=1), "sums"),
    (DepthPruningModifier(layers=[1]), "weights"),
    (StructuredPruningModifier(importance="activation", dimension="heads"), "sums"),
    (StructuredPruningModifier(importance="activation", dimension="channels", input_shape=[4]), "sums"),
    (StructuredPruningModifier(dimension="channels"), "alone"),
    (StructuredPruningModifier(dimension="mlp"), "weights"),
]


@pytest.mark.parametrize(("modifier", "team"), TEAMS, ids=str)
def test_how_each_modifier_works_in_a_team(modifier: Modifier, team: str) -> None:
    assert modifier.needs.team == team
