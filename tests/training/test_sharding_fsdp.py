"""Models that FSDP2 shards over two ranks (gloo processes): training, checkpoints and exports are those of one rank.

The two ranks run all cases once; the tests read what they wrote.
"""

import re
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from pydantic import PrivateAttr

from lightning_compress import (
    AutoRoundModifier,
    AWQModifier,
    CompressionCallback,
    DistillationModifier,
    FreezeModifier,
    GPTQModifier,
    MagnitudePruningModifier,
    QATModifier,
    QuantizationModifier,
    RotationModifier,
    SmoothQuantModifier,
    SparseGPTModifier,
    WandaPruningModifier,
    load,
)
from lightning_compress.core import Modifier, Needs
from lightning_compress.layers.sharded import full, is_dtensor
from tests.support.export_models import without_errors
from tests.support.sharded_runs import STEPS, Language, Losses, llama, trainer
from tests.support.two_ranks import run_two_ranks

HEAD = ["lm_head"]
STATIC = {
    "targets": ["Linear"],
    "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
    "input_activations": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False},
}
TRAINED = ["qat_w4", "pruned_2of4", "distilled"]
TRAINED_SLOWLY = ["gradual", "pruned_qat"]
CALIBRATED = ["gptq_w4", "rounded"]
CALIBRATED_SLOWLY = [
    "gptq_three_batches", "smoothquant_gptq_w8a8", "awq_w4", "autoround_w4", "sparsegpt_owl", "wanda_2of4",
    "pruned_at_the_end",
]  # fmt: skip
STATIC_INPUTS = "static"  # rounds activations, so that bits of a sum decide


def qat():
    return QATModifier(scheme="W4A16", group_size=16, ignore=HEAD)


def recipes():
    """By case the modifiers; each call makes new ones."""
    pruned = {"ignore": HEAD, "mask_structure": "2:4"}
    return {
        "qat_w4": [qat()],
        "pruned_2of4": [MagnitudePruningModifier(start=2, **pruned)],
        "gradual": [MagnitudePruningModifier(start=2, end=15, ignore=HEAD)],
        "distilled": [
            DistillationModifier(teacher="self", hidden={"model.layers.0": "model.layers.0"}),
            FreezeModifier(targets=["re:.*embed_tokens"], end=10),
            MagnitudePruningModifier(start=0, **pruned),
        ],
        "pruned_qat": [MagnitudePruningModifier(start=0, **pruned), qat()],
        "static": [QATModifier(config_groups={"all": STATIC}, ignore=HEAD, observe_until=12, learn_activations=True)],
    }


def calibrations():
    """By case the modifiers that act after training."""
    w4 = {"scheme": "W4A16", "group_size": 16}
    return {
        "gptq_w4": [GPTQModifier(**w4)],
        "gptq_three_batches": [GPTQModifier(**w4)],  # two ranks cannot share them
        "smoothquant_gptq_w8a8": [SmoothQuantModifier(), GPTQModifier(scheme="W8A8", ignore=HEAD)],
        "awq_w4": [AWQModifier(scheme="W4A16_ASYM", group_size=16, ignore=HEAD)],
        "autoround_w4": [AutoRoundModifier(**w4, ignore=HEAD, iters=3)],
        "sparsegpt_owl": [SparseGPTModifier(sparsity=0.5, sparsity_profile="owl", ignore=HEAD)],
        "wanda_2of4": [WandaPruningModifier(sparsity=0.5, mask_structure="2:4", ignore=HEAD)],
        "rounded": [QuantizationModifier(targets=["Linear", "Embedding"], scheme="W8A16", group_size="auto")],
        "pruned_at_the_end": [MagnitudePruningModifier(ignore=HEAD)],
    }


class OneWhole(Modifier):
    """Notes which blocks are whole whenever a layer is called, and when a block is finished."""

    needs: ClassVar[Needs] = Needs(data=True, sharded=True)
    _most: list[int] = PrivateAttr(default_factory=list)
    _finished: list[bool] = PrivateAttr(default_factory=list)

    def on_initialize(self, state, **kwargs):
        return True

    def on_calibration_start(self, state, event, **kwargs):
        for module in state.model.modules():
            if isinstance(module, torch.nn.Linear):
                self.hook(module, lambda *args: self._most.append(len(self._whole(state))))

    def on_block_end(self, state, event, **kwargs):
        self._finished.append(self._whole(state) == ([] if state.block is None else [state.block]))

    def _whole(self, state):
        return [block for block in state.model.model.layers if not all(map(is_dtensor, block.parameters()))]


class Cut(Callback):
    """The power fails in the second epoch, between two steps."""

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == STEPS + 4:
            raise KeyError("power cut")


def weights(module):
    return {name: full(value) for name, value in module.state_dict().items()}


def run(folder: Path, name: str, ranks: int, columns: int = 1, *, clipped: bool = True) -> None:
    """A fit of one case; its losses and weights into a file."""
    losses, training = Losses(), recipes()
    batches = 3 if name == "gptq_three_batches" else 4
    modifiers = training.get(name) or calibrations()[name]
    callback = CompressionCallback(modifiers, verify=False, calibration_batches=batches)
    arguments = {"columns": columns, "max_epochs": int(name in training)}
    if clipped:  # torch cannot clip parameters of two meshes
        arguments["gradient_clip_val"] = 1.0
    runner, module = trainer(folder / name, losses, callback, ranks=ranks, **arguments), Language()
    runner.fit(module)
    rows = [(row.module, row.technique, row.sparsity) for row in callback.ledger]
    held = {"losses": losses.values, "weights": weights(module), "ledger": rows}
    torch.save(held, folder / f"{name}-{runner.global_rank}.pt")


def resume(folder: Path) -> None:
    """A run that fails, one that goes on from its checkpoint, and one that is whole, of the best weights."""

    def fit(case: str, *callbacks: Callback, **arguments):
        saving = ModelCheckpoint(folder / case / "saved", filename="{step}", monitor="val/loss", save_last=True)
        modifiers = [MagnitudePruningModifier(start=2, end=30), qat()]  # masks grow after validation, too
        losses, compression = Losses(), CompressionCallback(modifiers, verify=False)
        runner = trainer(folder / case, losses, compression, saving, *callbacks, ranks=2, max_epochs=2)
        module = Language()
        runner.fit(module, **arguments)
        best = [checkpoint for checkpoint in [compression.run.facts.get("best_checkpoint")] if checkpoint]
        held = {"losses": losses.values, "weights": weights(module), "best": [Path(path).name for path in best]}
        torch.save(held, folder / f"{case}-{runner.global_rank}.pt")
        return runner, module

    runner, module = fit("whole")
    before = weights(module)
    found = runner.validate(module, ckpt_path="best", verbose=False)
    fresh = Language()
    again = trainer(folder / "fresh", ranks=2)
    other = again.validate(fresh, ckpt_path=folder / "whole" / "compressed.ckpt", verbose=False)
    same = all(torch.equal(before[name], value) for name, value in weights(module).items())
    held = {"same": same, "found": found, "other": other, "fresh": weights(fresh)}
    torch.save(held, folder / f"validated-{runner.global_rank}.pt")
    with suppress(KeyError):
        fit("cut", Cut())
    fit("resumed", ckpt_path=folder / "cut" / "saved" / "last.ckpt")


def one_block(folder: Path) -> None:
    modifier = OneWhole()
    runner, module = trainer(folder, CompressionCallback(modifier, evaluate=False), ranks=2, max_epochs=0), Language()
    runner.fit(module)
    most, finished = max(modifier._most), modifier._finished
    torch.save({"most": most, "finished": finished}, folder / f"one_block-{runner.global_rank}.pt")


def refusals(folder: Path) -> None:
    """The messages of set-up."""
    messages = {}
    cases = {
        "unannounced": (Language(announces=False), [qat()], {}),
        "rotation": (Language(), [RotationModifier()], {}),
        "global": (Language(), [MagnitudePruningModifier(start=0, end=4, scope="global")], {}),
        "late teacher": (Language(), [DistillationModifier(teacher="self", start=3)], {}),
        "hand over": (Language(), [GPTQModifier(scheme="W4A16", start=3), QATModifier(scheme="W4A16", start=3)], {}),
        "columns": (Language(), [qat()], {"columns": 2}),
    }
    for case, (module, modifiers, arguments) in cases.items():
        runner = trainer(folder / "refused", CompressionCallback(modifiers), ranks=2, **arguments)
        try:
            runner.fit(module)
        except ValueError as error:
            messages[case] = str(error)
    torch.save(messages, folder / f"refused-{runner.global_rank}.pt")


def two_ranks(folder: Path, work):
    import transformers.models.llama.modeling_llama  # noqa: F401  (once, not in each process)

    def single_threaded(rank: int) -> None:
        torch.set_num_threads(1)
        work()

    for name in ("columns", "one_block"):
        (folder / name).mkdir()
    ends = run_two_ranks(single_threaded, folder, 300)
    assert ends == ["", ""], "\n".join(ends)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")

    def work() -> None:
        for name in (*TRAINED, STATIC_INPUTS, *CALIBRATED):
            run(folder, name, 2)
        run(folder / "columns", "gptq_w4", 2, columns=2, clipped=False)
        one_block(folder / "one_block")
        resume(folder)
        refusals(folder)

    return two_ranks(folder, work)


@pytest.fixture(scope="module")
def slow_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slow_ranks")

    def work() -> None:
        for name in (*TRAINED_SLOWLY, *CALIBRATED_SLOWLY):
            run(folder, name, 2)
        run(folder / "columns", "distilled", 2, columns=2, clipped=False)

    return two_ranks(folder, work)


@pytest.fixture
def of_two(name, request):
    """The folder with the case of this name."""
    slow = name in (*TRAINED_SLOWLY, *CALIBRATED_SLOWLY)
    return request.getfixturevalue("slow_folder" if slow else "folder")


def cases(names, slow_names):
    return [*names, *(pytest.param(name, marks=pytest.mark.slow) for name in slow_names)]


def read(folder: Path, case: str, rank: int = 0):
    return torch.load(folder / f"{case}-{rank}.pt", weights_only=True)


@pytest.mark.parametrize("name", cases(TRAINED, TRAINED_SLOWLY))
def test_twenty_steps_are_those_of_one_rank(of_two, tmp_path, name):
    run(tmp_path, name, 1)
    one, two = read(tmp_path, name), read(of_two, name)
    assert len(one["losses"]) == STEPS
    assert max(abs(a - b) for a, b in zip(one["losses"], two["losses"], strict=True)) < 1e-5
    assert one["weights"].keys() == two["weights"].keys()
    for key, value in one["weights"].items():
        assert torch.allclose(value, two["weights"][key], atol=1e-5), key
    assert one["ledger"] == two["ledger"]


@pytest.mark.parametrize("name", cases(CALIBRATED, CALIBRATED_SLOWLY))
def test_the_calibrated_export_is_that_of_one_rank_file_by_file(of_two, tmp_path, name):
    run(tmp_path, name, 1)
    assert files(of_two / name) == files(tmp_path / name)


def test_layers_that_ranks_share_are_calibrated_as_by_one_rank(folder, tmp_path):
    """Tensor parallelism."""
    run(tmp_path, "gptq_w4", 1)
    assert files(folder / "columns" / "gptq_w4") == files(tmp_path / "gptq_w4")


@pytest.mark.slow
def test_layers_that_ranks_share_train_as_on_one_rank(slow_folder, tmp_path):
    run(tmp_path, "distilled", 1, clipped=False)
    one, two = read(tmp_path, "distilled"), read(slow_folder / "columns", "distilled")
    assert len(one["losses"]) == STEPS
    assert all(abs(a - b) < 1e-5 for a, b in zip(one["losses"], two["losses"], strict=True))


def test_one_block_is_whole_at_a_time(folder):
    for rank in (0, 1):
        held = read(folder / "one_block", "one_block", rank)
        assert held["most"] == 1
        assert held["finished"] == [True] * 4  # two blocks, and the modules before and after them


@pytest.mark.parametrize("name", cases([*TRAINED, STATIC_INPUTS], TRAINED_SLOWLY))
def test_the_export_is_that_of_the_trained_weights(of_two, name):
    """Both ranks hold shards of the weights that rank 0 wrote, packed where they are quantized."""
    loaded = load(of_two / name / "compressed", llama(), packed=False).state_dict()
    for rank in (0, 1):
        held = read(of_two, name, rank)["weights"]
        for key, value in loaded.items():
            assert torch.equal(value, held[f"model.{key}"]), key


def test_a_run_that_was_cut_ends_as_one_that_was_not(folder):
    whole, resumed = read(folder, "whole"), read(folder, "resumed")
    assert resumed["losses"] == whole["losses"][-len(resumed["losses"]) :]
    assert len(resumed["losses"]) == STEPS
    assert resumed["best"] == whole["best"] != []
    for key, value in whole["weights"].items():
        assert torch.equal(value, resumed["weights"][key]), key


def test_the_best_weights_are_compressed_and_validated(folder):
    held = read(folder, "validated")
    assert held["same"]
    assert held["found"] == held["other"]
    for key, value in read(folder, "whole")["weights"].items():
        assert torch.equal(value, held["fresh"][key]), key


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("unannounced", r"is sharded \(a DTensor\) before the modifiers were initialized.*before_sharding\(self\)"),
        (
            "rotation",
            "RotationModifier cannot work on a model that ModelParallelStrategy shards: it needs whole weights",
        ),
        ("global", "MagnitudePruningModifier cannot .* shards: scope='global' ranks all targets at once"),
        ("late teacher", "DistillationModifier cannot .* shards: teacher='self' copies the model at start=3"),
        ("hand over", "GPTQModifier cannot .* shards: with start=3.0 it calibrates during training"),
        ("columns", r"QATModifier cannot .* it parametrizes weights.*\(tensor_parallel_size=2\); use"),
    ],
)
def test_what_cannot_work_is_refused_at_set_up(folder, case, message):
    for rank in (0, 1):
        assert re.search(message, read(folder, "refused", rank)[case], re.DOTALL)


def files(run: Path):
    """The content of an export; its manifest names the run, so only that it exists."""
    content = {path.name: path.read_bytes() for path in (run / "compressed").iterdir()}
    return content | {"export_manifest.json": b"", "README.md": without_errors(content["README.md"])}
