"""``train.py`` end to end on a tiny model: train, compress, test the compressed one, sweep, and no training at all."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf, open_dict
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import train as app
from examples.model_llama import LlamaDemo
from lightning_compress import load
from lightning_compress.report.sweep_jobs import read_jobs

ROOT = Path(__file__).resolve().parents[1]
TINY = [
    "trainer=cpu",
    "trainer.max_epochs=1",
    "logger=none",
    "~callbacks.progress_bar",
    "+trainer.enable_progress_bar=false",
    "+trainer.enable_model_summary=false",
    "model.hidden_size=128",
    "model.intermediate_size=128",
    "model.num_layers=1",
    "data.block_length=32",
    "data.batch_size=4",
    "data.train_blocks=16",
    "data.val_blocks=16",
    "data.test_blocks=16",
    "data.calibration_blocks=16",
]


def values_per_row(weight: torch.Tensor) -> int:
    """The largest number of different values in a row: 4 bits in one group of 128 leave at most 16."""
    return max(len(row.unique()) for row in weight)


@pytest.fixture
def library(tmp_path: Path) -> str:
    """A folder of Python files, to be quick; every part of the split gets some."""
    folder = tmp_path / "library"
    folder.mkdir()
    for i in range(60):
        (folder / f"module_{i}.py").write_text(f"def f_{i}(x):\n    return [x * {i}, {i * i}]\n" * 20)
    return f"+data.folder={folder}"


@pytest.fixture
def trained(app_config: Any, library: str) -> Any:
    """The config, the metrics and the folder of a run with compression."""
    cfg = app_config("+compress=gptq_w4", *TINY, library)
    return cfg, app.train(cfg), Path(cfg.paths.output_dir)


def test_a_plan_alone(app_config: Any, library: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is trained, compressed or tested; the exit code says that it is no failure."""
    cfg = app_config("+compress=gptq_w4", "compress_plan=true", *TINY, library)
    with pytest.raises(SystemExit) as ended:
        app.train(cfg)
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "plan: GPTQModifier on LlamaForCausalLM" in printed
    assert "seconds of metric before" in printed
    folder = Path(cfg.paths.output_dir)
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["plan.json"]


def test_a_plan_needs_a_recipe_and_a_model_in_memory(app_config: Any, library: str) -> None:
    with pytest.raises(ValueError, match="compress_plan=true plans a compression"):
        app.train(app_config("compress_plan=true", *TINY, library))
    streamed = app_config("+compress=rtn_w4", "compress_plan=true", "+callbacks.compress.stream=true", *TINY, library)
    with pytest.raises(ValueError, match="lightning-compress plan None RECIPE"):
        app.train(streamed)


def test_train_compress_and_test(trained: Any) -> None:
    cfg, metrics, folder = trained
    assert {"train/loss", "val/loss", "test/loss", "test/perplexity"} <= set(metrics)
    assert metrics["test/perplexity"] == pytest.approx(torch.tensor(metrics["test/loss"]).exp().item(), rel=1e-3)
    assert {p.name for p in (folder / "compressed").iterdir()} >= {"model.safetensors", "config.json", "recipe.yaml"}
    assert "quantization_config" in json.loads((folder / "compressed" / "config.json").read_text())
    assert (folder / "checkpoints" / "best.ckpt").exists()


def test_the_test_measures_the_compressed_model(trained: Any) -> None:
    """By the weights of compressed.ckpt, in a module made anew, and not those of best.ckpt."""
    cfg, metrics, folder = trained
    losses = {}
    for name in ("compressed.ckpt", "checkpoints/best.ckpt"):
        module = LlamaDemo.load_from_checkpoint(folder / name, weights_only=True)
        data = app.hydra.utils.instantiate(cfg.data)
        data.setup("test")
        with torch.no_grad():
            losses[name] = torch.stack([module.eval()._loss(b)[0] for b in data.test_dataloader()]).mean().item()
        weight = module.model.model.layers[0].mlp.down_proj.weight
        assert (values_per_row(weight) <= 16) == (name == "compressed.ckpt")
    assert metrics["test/loss"] == pytest.approx(losses["compressed.ckpt"], abs=1e-5)
    assert losses["compressed.ckpt"] != pytest.approx(losses["checkpoints/best.ckpt"], abs=1e-6)


def test_a_trained_model_is_compressed_without_training(trained: Any, app_config: Any, library: str) -> None:
    cfg, _, folder = trained
    again = app_config(
        "+compress=gptq_w4", *TINY, library, "train=false", f"ckpt_path={folder / 'checkpoints' / 'best.ckpt'}"
    )
    with open_dict(again):
        again.paths.output_dir = str(folder.parent / "again")
    metrics = app.train(again)
    assert (folder.parent / "again" / "compressed" / "model.safetensors").read_bytes() == (
        folder / "compressed" / "model.safetensors"
    ).read_bytes()
    assert metrics["test/loss"] > 0


def test_without_compress_the_dense_model_is_tested(app_config: Any, library: str) -> None:
    cfg = app_config(*TINY, library)
    assert "test/loss" in app.train(cfg)
    assert not (Path(cfg.paths.output_dir) / "compressed").exists()


def test_a_pretrained_model_any_text_and_its_tokenizer(app_config: Any, tmp_path: Path) -> None:
    words = ["[UNK]", "the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "pretrained"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    dense = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), max_position_embeddings=64, **sizes))
    dense.save_pretrained(folder)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over a lazy dog . " * 200)
    kept = [o for o in TINY if not o.startswith("model.")]

    cfg = app_config(
        "+compress=rtn_w4", *kept, "model=hf", "data=text", f"model.path={folder}", f"data.path={text}", "train=false"
    )
    assert "test/perplexity" in app.train(cfg)

    exported = Path(cfg.paths.output_dir) / "compressed"
    again = AutoTokenizer.from_pretrained(exported)
    model = AutoModelForCausalLM.from_pretrained(exported)
    ids = again("the quick brown", return_tensors="pt").input_ids
    assert again.decode(model.generate(ids, max_new_tokens=4, do_sample=False)[0])
    assert values_per_row(dense.model.layers[0].mlp.up_proj.weight) > 16


def streaming(tmp_path: Path) -> list[str]:
    """Options that compress a small model from folder to folder; both are written."""
    words = ["[UNK]", "the", "quick", "brown", "fox"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "pretrained"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), max_position_embeddings=64, **sizes)).save_pretrained(folder)
    (tmp_path / "text.txt").write_text("the quick brown fox . " * 400)
    options = [o for o in TINY if not o.startswith("model.")]
    options += ["model=hf", "data=text", f"model.path={folder}", f"data.path={tmp_path / 'text.txt'}"]
    return [*options, "+compress=gptq_w4", "callbacks.compress.stream=true"]


def test_a_model_larger_than_memory_goes_from_folder_to_folder(app_config: Any, tmp_path: Path) -> None:
    options = streaming(tmp_path)
    with pytest.raises(ValueError, match="without training: expected model=hf model.path=FOLDER train=false, got"):
        app.train(app_config(*options))
    cfg = app_config(*options, "train=false")
    assert app.train(cfg) == {}
    exported = Path(cfg.paths.output_dir) / "compressed"
    assert values_per_row(load(exported, packed=False).model.layers[1].mlp.up_proj.weight) <= 16
    rows = list(csv.DictReader((Path(cfg.paths.output_dir) / "report" / "modules.csv").open()))
    assert len(rows) == 14
    assert all(float(row["error"]) > 0 for row in rows)


@pytest.mark.slow
def test_two_processes_stream_the_files_of_one(app_config: Any, tmp_path: Path) -> None:
    options = [*streaming(tmp_path), "train=false"]
    cfg = app_config(*options)
    app.train(cfg)
    command = [sys.executable, str(ROOT / "train.py"), *options, "trainer.devices=2", "+trainer.strategy=ddp"]
    command += [f"hydra.run.dir='{tmp_path / 'two'}'"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    one, two = (
        {path.name: path.read_bytes() for path in (folder / "compressed").iterdir()}
        for folder in (Path(cfg.paths.output_dir), tmp_path / "two")
    )
    assert one == two
    assert (tmp_path / "two" / "report" / "modules.csv").exists()


def test_strategies_that_share_no_folder_are_refused(app_config: Any, tmp_path: Path) -> None:
    cfg = app_config(*streaming(tmp_path), "train=false", "trainer.devices=2", "+trainer.strategy=ddp_spawn")
    with pytest.raises(ValueError, match="with trainer.strategy=ddp, and got trainer.strategy=ddp_spawn"):
        app.train(cfg)


def test_a_sweep_runs_each_recipe_and_ends_in_one_table_and_one_figure(tmp_path: Path, library: str) -> None:
    folder = tmp_path / "a sweep"
    overrides = [
        "-m",
        *TINY,
        library,
        "+compress=gptq_w4,awq_w4,[smoothquant,gptq_w8a8]",
        "optimized_metric=test/loss",
        "+callbacks.compress.verify=false",
    ]
    run = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *overrides, f"hydra.sweep.dir='{folder}'"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    with (folder / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["compress"] for row in rows] == ["gptq_w4", "awq_w4", "[smoothquant,gptq_w8a8]"]
    assert "1" in {row["on_front"] for row in rows}
    for row, names in zip(rows, (["GPTQ"], ["AWQ"], ["SmoothQuant", "GPTQ"]), strict=True):
        recipe = yaml.safe_load((folder / row["job"] / "compressed" / "recipe.yaml").read_text())
        assert [modifier["type"] for modifier in recipe["modifiers"].values()] == [f"{name}Modifier" for name in names]
        summary = json.loads((folder / row["job"] / "report" / "summary.json").read_text())
        assert float(row["after"]) == summary["metric"]["perplexity"]["after"]
        assert int(row["size"]) == (folder / row["job"] / "compressed" / "model.safetensors").stat().st_size
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "results of 3 of 3 jobs; perplexity (smaller is better)" in run.stdout


def test_the_error_of_every_job_that_fails_is_in_its_log(tmp_path: Path) -> None:
    """Hydra runs all jobs of a sweep and raises the error of the first one that failed."""
    settings = ["-m", "train=false", "test=false", "seed=1,2", f"hydra.sweep.dir={tmp_path}"]
    command = [sys.executable, str(ROOT / "train.py"), *settings]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False).returncode == 1
    assert [job.fault for job in read_jobs(tmp_path)] == [
        "it has no report/summary.json; train.log ends: "
        "ValueError: nothing to do: train=false, test=false, and no +compress=NAME; set one of them"
    ] * 2


def test_a_run_that_a_signal_ends_does_not_look_done(app_config: Any, library: str, tmp_path: Path) -> None:
    """Lightning turns SIGTERM into a SystemExit without a code."""
    slow = [*TINY, library, "trainer.max_epochs=100000", f"hydra.run.dir={tmp_path / 'run'}"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *slow],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    while process.poll() is None and not checkpoint.exists():
        time.sleep(0.1)
    process.terminate()
    assert process.wait(120) == 143


STACK = ["+compress=[distill,magnitude_cubic,qat_w4]", "trainer.max_epochs=3", "test=false"]
KILL = "+callbacks.kill._target_=tests.support.killing.KillBefore"
KILLED = {
    "at an epoch's end": (5, []),
    "inside an epoch": (7, ["+trainer.val_check_interval=0.5"]),
    "with workers": (7, ["+trainer.val_check_interval=0.5", "data.num_workers=2"]),
}


@pytest.fixture(scope="module")
def attempt() -> Iterator[Callable[..., int]]:
    """``attempt(folder, *overrides)``: a run of train.py in a process of its own; the signal that ended it."""
    command = [sys.executable, "-m", "tests.support.app_runs"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes) as runner:
        assert runner.stdin is not None
        assert runner.stdout is not None

        def attempted(folder: Path, *overrides: str) -> int:
            folder.mkdir(exist_ok=True)
            runner.stdin.write(json.dumps([overrides, str(folder)]) + "\n")
            runner.stdin.flush()
            answer = json.loads(runner.stdout.readline())
            assert not answer["failed"], answer["failed"]
            return int(answer["signal"])

        yield attempted
        runner.stdin.close()


@pytest.mark.parametrize("moment", [*list(KILLED)[:2], pytest.param("with workers", marks=pytest.mark.slow)])
def test_a_killed_run_of_the_app_resumes_with_the_same_bits(
    library: str, tmp_path: Path, attempt: Callable[..., int], moment: str
) -> None:
    """Four steps an epoch; the last checkpoint is that of step 4, or with a validation in between of step 6."""
    if moment == "with workers":
        pytest.importorskip("torchdata")
    step, changes = KILLED[moment]
    overrides = [*TINY, *STACK, library, *changes]
    assert attempt(tmp_path / "whole", *overrides) == 0
    killed = tmp_path / "killed"
    assert attempt(killed, *overrides, KILL, f"+callbacks.kill.step={step}") == signal.SIGKILL
    last = killed / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == step - 1
    assert attempt(killed, *overrides, f"ckpt_path={last}") == 0
    files = [folder / "compressed" / "model.safetensors" for folder in (tmp_path / "whole", killed)]
    assert files[0].read_bytes() == files[1].read_bytes()


# -- what is refused -------------------------------------------------------------------------------------------------


def test_a_string_for_compress_is_refused(app_config: Any) -> None:
    """What Hydra makes of +compress=gptq_w4 where the package is not installed."""
    cfg = app_config(*TINY)
    with open_dict(cfg):
        cfg.compress = "gptq_w4"
    with pytest.raises(ValueError, match=r"compress=gptq_w4 set a plain string.*pip install lightning-compress"):
        app.train(cfg)


def test_nothing_to_do_is_refused(app_config: Any, library: str) -> None:
    with pytest.raises(ValueError, match=r"nothing to do: train=false, test=false, and no \+compress=NAME"):
        app.train(app_config(*TINY, library, "train=false", "test=false"))


def test_a_wrong_argument_is_refused_before_data_and_model_are_made(app_config: Any) -> None:
    cfg = app_config("+compress=gptq_w4", "callbacks.compress.modifiers.gptq.schema=W8A16")
    cfg.data._target_ = cfg.model._target_ = "not.there"
    with pytest.raises(Exception, match="unknown argument 'schema'; did you mean 'scheme'"):
        app.train(cfg)


def test_a_logger_among_the_callbacks_is_refused() -> None:
    from lightning.pytorch.callbacks import Callback

    configs = OmegaConf.create({"csv": {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": "x"}})
    with pytest.raises(ValueError, match=r"csv: expected a Callback, lightning\..*CSVLogger is a CSVLogger"):
        app.instantiate_each(configs, Callback)


def test_an_unknown_metric_is_named() -> None:
    assert app.optimized({"test/loss": 1.5}, "test/loss") == 1.5
    assert app.optimized({"test/loss": 1.5}, None) is None
    with pytest.raises(ValueError, match="optimized_metric=test/acc is none of this run's metrics: test/loss"):
        app.optimized({"test/loss": 1.5}, "test/acc")
