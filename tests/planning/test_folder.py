import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from lightning_compress.cli import main
from lightning_compress.planning.folder import plan_folder
from tests.planning.test_copies import llama


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "model"
    llama(4).to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_a_folder_is_planned_without_its_weights(source):
    plan = plan_folder(source, "gptq_w4", batches=4, rows=1, tokens=16)
    assert plan.refusals == ()
    assert plan.unknown == ()
    assert plan.seconds["calibration"] > 0
    assert len(plan.modules) == 28
    assert {m.scheme for m in plan.modules} == {"W4A16 g32 sym", "W4A16 g64 sym"}
    weights = source / "model.safetensors"
    assert plan.bytes_before == pytest.approx(weights.stat().st_size, rel=0.1)  # but for the header
    assert plan.memory["peak"] > plan.bytes_before


def test_the_command_prints_the_plan(source, capsys):
    assert main(["plan", str(source), "rtn_w4", "--tokens", "16"]) == 0
    assert "plan: QuantizationModifier on LlamaForCausalLM" in capsys.readouterr().out
    assert main(["plan", str(source), "rtn_w4", "--tokens", "16", "--json"]) == 0
    assert capsys.readouterr().out.startswith('{\n  "recipe"')


def test_what_is_wrong_is_said(source, tmp_path, capsys):
    assert main(["plan", str(tmp_path), "gptq_w4"]) == 2
    assert "holds no config.json, expected the folder of a model of transformers" in capsys.readouterr().err
    assert main(["plan", str(source), "gptq_w4", "--rows", "0"]) == 2
    assert "rows=0, expected at least 1" in capsys.readouterr().err
    assert main(["plan", str(source), "gptq_w5"]) == 2
    recipe = tmp_path / "wide.yaml"
    modifier = "{_target_: lightning_compress.GPTQModifier, scheme: W4A16, group_size: 48}"
    recipe.write_text(f"modifiers: {{gptq: {modifier}}}\n")
    assert main(["plan", str(source), str(recipe)]) == 1
    assert "refused" in capsys.readouterr().out


def test_the_dtype_is_that_of_the_run(source):
    whole, half = (plan_folder(source, "rtn_w4", tokens=16, dtype=d).bytes_before for d in (torch.float32, None))
    assert whole == 2 * half


def test_a_model_of_pictures_is_planned(tmp_path):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8)).save_pretrained(tmp_path)
    plan = plan_folder(tmp_path, "rtn_w8")
    assert (plan.model, plan.refusals, len(plan.modules)) == ("ViTForImageClassification", (), 13)
