"""How far blocks are from the dense model: recomputed from the two models, for every walk and any number of ranks."""

from copy import deepcopy
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import (
    DepthPruningModifier,
    GPTQModifier,
    QuantizationModifier,
    SmoothQuantModifier,
    TuneModifier,
    compress,
)
from lightning_compress.calibration.divergence import NUMBERS, _sample, children_of, compared_batches, row_errors
from lightning_compress.team import Team
from tests.support.architecture_models import ARCHITECTURES
from tests.support.calibration_models import Biased, Dense, EncoderDecoder, Layered, Stages, make_batches, seeded
from tests.support.processes import run_processes

C = 8


def gptq() -> GPTQModifier:
    weights = {"num_bits": 4, "type": "int", "strategy": "channel"}
    return GPTQModifier(config_groups={"all": {"targets": ["Linear", "Conv2d"], "weights": weights}}, ignore=["head"])


def expected(model: nn.Module, dense: nn.Module, names: list[str], batches: list[Any], run: Any) -> dict[str, Any]:
    """Mean and standard error over rows, from all outputs of both models in float64."""
    outputs: dict[tuple[int, str], list[Tensor]] = {}
    for which, one in enumerate((model, dense)):
        for name in names:
            one.get_submodule(name).register_forward_hook(
                lambda _m, _a, out, key=(which, name): outputs.setdefault(key, []).append(
                    (out[0] if isinstance(out, tuple) else out).double().clone()
                )
            )
        with torch.no_grad():
            for batch in batches:
                run(one, batch)
    facts = {}
    for name in names:
        rows = [
            float(((y - d).norm() / d.norm()) ** 2)
            for ys, ds in zip(outputs[0, name], outputs[1, name], strict=True)
            for y, d in zip(ys, ds, strict=True)
        ]
        facts[name] = {"error": mean(rows), "standard_error": stdev(rows) / len(rows) ** 0.5, "rows": len(rows)}
    return facts


def names_of(model: nn.Module, *lists: str) -> list[str]:
    return [f"{name}.{i}" for name in lists for i in range(len(model.get_submodule(name)))]


CASES: dict[str, tuple[Any, tuple[str, ...], tuple[int, ...], dict[str, Any]]] = {
    "one pass": (Layered, ("layers",), (3, 5, C), {"walk": "one_pass"}),
    "two passes": (Layered, ("layers",), (3, 5, C), {"walk": "two_pass"}),
    "a head that needs all outputs": (Dense, ("blocks",), (3, 5, C), {}),
    "arguments from other blocks": (Biased, ("blocks",), (3, 5, C), {}),
    "stages that write into their inputs": (Stages, ("stages",), (3, 3, 9, 9), {}),
    "an encoder and a decoder": (EncoderDecoder, ("encoder", "decoder"), (3, 5, C), {}),
    "on the disk": (Layered, ("layers",), (3, 5, C), {"cache_activations": "disk"}),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_that_of_a_plain_run_of_both_models(case):
    build, lists, shape, options = CASES[case]
    model = seeded(build).eval()
    dense, batches = deepcopy(model), make_batches(8, *shape)

    def run(model, batch):
        return model(batch, batch) if build is EncoderDecoder else model(batch)

    ledger = compress(model, gptq(), batches, forward=run, **options)
    names = names_of(model, *lists)
    assert list(ledger.blocks) == names
    wanted = expected(model, dense, names, batches[:1], run)
    for name, facts in wanted.items():
        assert ledger.blocks[name] == pytest.approx(facts, rel=1e-3), name
        assert facts["error"] > 1e-5
    assert max(facts["standard_error"] for facts in wanted.values()) > 0


def test_a_model_without_repeated_blocks_is_compared_by_its_children():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(C, 16), nn.Tanh(), nn.Linear(16, 6)).eval()
    dense, batches = deepcopy(model), make_batches(8, 4, C)
    ledger = compress(model, gptq(), batches)
    wanted = expected(model, dense, ["0", "1", "2"], batches[:1], lambda model, batch: model(batch))
    assert {name: pytest.approx(facts, rel=1e-3) for name, facts in wanted.items()} == ledger.blocks


def test_children_of_an_only_child_are_taken():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert list(children_of(nn.ModuleDict({"net": net}))) == ["net.0", "net.1"]
    assert list(children_of(nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Linear(2, 2)})}))) == ["a.b"]
    assert children_of(nn.Linear(2, 2)) == {}


@pytest.mark.parametrize("training", [False, True])
def test_padding_does_not_count_and_training_after_the_walk_does(training):
    architecture = ARCHITECTURES["llama"]
    model = architecture.build().eval()
    dense, generator = deepcopy(model), torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 48, (4, 12), generator=generator) for _ in range(8)]
    mask = torch.ones(4, 12, dtype=torch.long)
    mask[:, 9:] = 0
    batches = [{"input_ids": one, "attention_mask": mask} for one in ids]
    arguments = {"targets": ["Linear"], "scheme": "W4A16", "group_size": 8, "ignore": ["lm_head"]}
    modifiers = [GPTQModifier(**arguments), *([TuneModifier(epochs=1)] if training else [])]
    ledger = compress(model, modifiers, batches)
    names = list(ledger.blocks)
    assert names == ["model.layers.0", "model.layers.1"]
    wanted = expected(model, dense, names, [ids[0][:, :9]], lambda model, batch: model(input_ids=batch))
    for name in names:
        assert ledger.blocks[name] == pytest.approx(wanted[name], rel=2e-3)


def test_results_are_not_other_ones():
    """The comparison draws no random numbers and shows no data to modifiers: what follows is as without it."""

    class Noisy(Layered):
        def forward(self, x, attention_mask=None):
            return super().forward(x + 0.1 * torch.randn_like(x))

    outcomes = []
    for compares in (True, False):
        model = seeded(Noisy).eval()
        with pytest.MonkeyPatch.context() as patch:
            if not compares:
                patch.setattr("lightning_compress.calibration.walker.compared_batches", lambda count, rows: 0)
            ledger = compress(model, gptq(), make_batches(8, 3, 5, C))
        assert bool(ledger.blocks) is compares
        outcomes.append((model.state_dict(), [(row.module, row.error, row.tokens) for row in ledger]))
    assert outcomes[0][1] == outcomes[1][1]
    assert all(torch.equal(tensor, outcomes[1][0][name]) for name, tensor in outcomes[0][0].items())


def test_nothing_is_said_of_blocks_that_are_cut_or_see_no_data():
    model = ARCHITECTURES["llama"].build().eval()
    batches = [{"input_ids": torch.randint(3, 48, (2, 8), generator=torch.Generator().manual_seed(0))}] * 8
    assert compress(deepcopy(model), [DepthPruningModifier(count=1)], batches).blocks == {}
    ledger = compress(
        deepcopy(model), QuantizationModifier(targets="Linear", scheme="W4A16", group_size=8, ignore="lm_head")
    )
    assert ledger.blocks == {}
    few = [batches[0]] * 7
    assert compress(model, SmoothQuantModifier(), few).blocks == {}


def _rank(counts: int, rank: int) -> Any:
    ledger = compress(seeded(Layered).eval(), gptq(), make_batches(counts, 1, 5, C), team=Team.of_processes())
    return ledger.blocks


@pytest.mark.parametrize("ranks", [2, 3])
def test_it_is_equal_on_any_number_of_ranks(tmp_path: Path, ranks):
    """Two batches are compared, so that the third rank has none of them."""
    alone = compress(seeded(Layered).eval(), gptq(), make_batches(8, 1, 5, C)).blocks
    assert alone["layers.0"]["rows"] == 2
    for other in run_processes(partial(_rank, 8), tmp_path, ranks):
        assert other == alone


def test_it_is_the_same_after_a_kill(tmp_path: Path):
    alone = compress(seeded(Layered).eval(), gptq(), make_batches(8, 3, 5, C)).blocks

    def end(text: str, finished: int, total: int) -> None:
        if finished == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(seeded(Layered).eval(), gptq(), make_batches(8, 3, 5, C), log=tmp_path / "log", progress=end)
    again = compress(seeded(Layered).eval(), gptq(), make_batches(8, 3, 5, C), log=tmp_path / "log", resume="must")
    assert again.blocks == alone


def test_how_many_batches():
    cases = {(16, 4): 1, (128, 1): 8, (16, 1): 2, (8, 1): 2, (8, 2): 1, (64, 4): 2, (1000, 32): 1, (7, 16): 0}
    assert {case: compared_batches(*case) for case in cases} == cases


def test_rows_of_zeros_and_padding_are_left_out():
    dense = torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, 4.0]])
    output = torch.tensor([[1.0, 1.0], [1.0, 1.0], [3.0, 9.0]])
    assert row_errors(output, dense) == [pytest.approx(1 / 5), pytest.approx(1.0)]
    assert row_errors(output, dense, torch.tensor([[1, 1], [1, 1], [1, 0]]).bool()) == [pytest.approx(1 / 5), 0.0]


def test_a_sample_of_a_large_output_takes_from_all_channels_alike():
    output = torch.arange(576).expand(2, 4096, 576)
    sample = _sample(output)
    assert NUMBERS / 2 < sample.shape[1] <= NUMBERS
    counts = sample[0].bincount(minlength=576)
    assert counts.min() > 0.9 * counts.max()
