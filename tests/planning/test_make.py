import warnings

import pytest
import torch
from safetensors import safe_open
from torch import nn

from lightning_compress import GPTQModifier, QATModifier, QuantizationModifier, compress, save
from lightning_compress.modifiers import AllocateModifier, DepthPruningModifier
from lightning_compress.planning.make import make_plan
from lightning_compress.planning.sizes import model_bytes
from tests.planning.test_copies import Stack, llama

IDS = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))


def stored(folder):
    with safe_open(next(folder.glob("*.safetensors")), "pt") as file:
        return sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118


@pytest.mark.parametrize(
    "modifier",
    [
        QuantizationModifier(scheme="W4A16", group_size=32, ignore=["lm_head"]),
        QuantizationModifier(scheme="W8A8", ignore=["lm_head"]),
        QuantizationModifier(scheme="NVFP4A16", ignore=["lm_head", "re:.*down_proj"]),
        QuantizationModifier(scheme="FP8_DYNAMIC", targets=["re:.*mlp.*proj"]),
    ],
    ids=["W4", "W8A8", "NVFP4", "FP8"],
)
def test_the_bytes_of_the_export_are_the_planned_ones(modifier, tmp_path):
    model = llama(2)
    plan = make_plan(model, [modifier.model_copy(deep=True)])
    assert plan.bytes_before == model_bytes(model)
    assert plan.refusals == ()
    compress(model, modifier)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(model, tmp_path / "out")
    assert plan.bytes_after == stored(tmp_path / "out")


def test_weights_of_recurrent_modules_are_planned_one_by_one(tmp_path):
    model, modifier = (
        nn.Sequential(nn.GRU(8, 16), nn.Identity()),
        QuantizationModifier(scheme="W8A16", group_size=-1, targets=["GRU"]),
    )
    plan = make_plan(model, [modifier.model_copy(deep=True)])
    assert [(module.name, module.kind) for module in plan.modules] == [("0.ih_l0", "GRU"), ("0.hh_l0", "GRU")]
    assert not plan.left_out
    compress(model, modifier)
    save(model, tmp_path / "out")
    assert plan.bytes_after == stored(tmp_path / "out")


def test_what_is_left_out_has_a_reason():
    model = nn.Sequential(
        nn.Embedding(8, 32), nn.Linear(32, 32), nn.Conv1d(32, 8, 1), nn.LayerNorm(1), nn.Linear(32, 4)
    )
    plan = make_plan(model, [QuantizationModifier(scheme="W8A16", group_size=-1, ignore=["4"])])
    assert [module.name for module in plan.modules] == ["1"]
    assert dict(plan.left_out) == {
        "0": "an embedding, which targets do not name",
        "2": "targets do not name it, nor the class Conv1d",
        "4": "in ignore, as 4",
    }


def test_every_refusal_of_set_up_is_in_the_plan():
    wrong = [
        GPTQModifier(scheme="W4A16", group_size=48, ignore=["lm_head"]),
        QuantizationModifier(scheme="W8A16", targets=["re:nothing"]),
    ]
    plan = make_plan(llama(2), wrong)
    assert len(plan.refusals) == 2
    assert plan.seconds == {}
    assert any("48" in text for text in plan.refusals)
    assert any("re:nothing" in text for text in plan.refusals)
    assert "refused" in str(plan)


def test_set_up_that_adds_parametrizations_leaves_the_model_alone():
    model = Stack(2)
    plan = make_plan(model, [QATModifier(scheme="W8A16", group_size=-1, start=0)])
    assert not any(hasattr(module, "parametrizations") for module in model.modules())
    assert [m.scheme for m in plan.modules] == ["W8A16 channel sym"] * 3
    assert plan.unknown[0].startswith("seconds and memory of QATModifier: they act during training")


def test_sizes_after_a_cut_are_unknown():
    plan = make_plan(llama(3), [DepthPruningModifier(layers=[1])])
    assert plan.bytes_after is None
    assert plan.unknown[0] == "sizes after the cuts of DepthPruningModifier"


def test_schemes_that_data_chooses_are_unknown():
    allocate = AllocateModifier(bits=5.5, candidates=["W4A16", "W8A16"], group_size=32)
    quantizer = GPTQModifier(scheme="allocated", ignore=["lm_head"])
    plan = make_plan(llama(3), [allocate, quantizer], {"input_ids": IDS}, 4)
    assert plan.refusals == ()
    assert plan.bytes_after is None
    assert plan.unknown == ("schemes and sizes of GPTQModifier: data decides; those shown are the largest",)
    assert plan.seconds["calibration"] > 0


def test_calibration_without_a_batch_is_not_estimated_and_with_one_it_is():
    modifier = GPTQModifier(scheme="W4A16", group_size=32, ignore=["lm_head"])
    plan = make_plan(llama(3), [modifier])
    assert plan.unknown == ("seconds and memory of calibration: no batch to try; give batches",)
    plan = make_plan(llama(3), [modifier], {"input_ids": IDS}, 8, eval_batches=5)
    assert set(plan.seconds) == {"calibration", "export", "metric before", "metric after"}
    assert plan.seconds["metric before"] > 0
    assert plan.memory["peak"] > plan.memory["model"]
    assert (plan.blocks, plan.batches, plan.unknown) == (3, 8, ())


def test_a_trial_that_fails_is_said():
    wrong = {"input_ids": IDS.float()}
    plan = make_plan(llama(3), [GPTQModifier(scheme="W4A16", group_size=32, ignore=["lm_head"])], wrong, 8)
    assert plan.unknown[0].startswith("seconds and memory of calibration: a trial failed: ")
