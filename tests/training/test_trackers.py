"""What loggers get: real TensorBoard and CSV loggers here, W&B (offline) and MLflow with `make test-trackers`."""

import csv
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger

from lightning_compress import CompressionCallback, QuantizationModifier
from lightning_compress.core.ledger import Ledger
from lightning_compress.training import trackers
from tests.support.training_runs import Regression, Sums

CONFIG = {"compress/QuantizationModifier/scheme": "W8A16", "compress/QuantizationModifier/group_size": -1}


class Named(Regression):
    """With hyperparameters, which Lightning logs before training."""

    def __init__(self):
        super().__init__()
        self.save_hyperparameters({"width": 8})


def run(folder: Path, *loggers) -> Trainer:
    torch.manual_seed(0)
    callback = CompressionCallback(QuantizationModifier(scheme="W8A16", group_size=-1))
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=list(loggers), callbacks=[callback], default_root_dir=folder,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(Named(), Sums())
    return trainer


def summary(folder: Path) -> dict:
    return json.loads((folder / "report" / "summary.json").read_text())


# -- CSV and TensorBoard -----------------------------------------------------------------------------------------------


def test_csv_has_the_recipe_and_where_the_files_are(tmp_path):
    logger = CSVLogger(tmp_path, name="csv")
    run(tmp_path, logger)
    hparams = yaml.safe_load(Path(logger.log_dir, "hparams.yaml").read_text())
    assert hparams["width"] == 8
    assert {name: hparams[name] for name in CONFIG} == CONFIG
    assert hparams["compress/report"] == str(tmp_path / "report")
    assert hparams["compress/export_dir"] == str(tmp_path / "compressed")
    lines = Path(logger.log_dir, "metrics.csv").read_text().splitlines()
    (row,) = [row for row in csv.DictReader(lines) if row["compress/modules"]]
    assert float(row["compress/model_bytes_after"]) == summary(tmp_path)["model_bytes_after"]


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    """Events of the run of the logger, and of the run below it."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path_factory.mktemp("board")
    logger = TensorBoardLogger(folder, name="board")
    run(folder, logger)
    events = [EventAccumulator(path) for path in (logger.log_dir, f"{logger.log_dir}/compress")]
    for accumulator in events:
        accumulator.Reload()
    return folder, *events


def test_tensorboard_has_the_recipe_as_hparams_of_a_run_of_its_own(board):
    from tensorboard.plugins.hparams import plugin_data_pb2

    folder, above, below = board
    hparams = []
    for accumulator in (above, below):
        content = accumulator.summary_metadata["_hparams_/session_start_info"].plugin_data.content
        start = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
        hparams.append({name: value.string_value or value.number_value for name, value in start.hparams.items()})
    assert hparams[0] == {"width": 8.0}
    assert {name: hparams[1][name] for name in CONFIG} == CONFIG
    facts, sums = summary(folder), {tag: below.Scalars(tag)[0].value for tag in below.Tags()["scalars"]}
    assert sums["compress/model_bytes_after"] == facts["model_bytes_after"]
    assert sums["compress/val/mse_after"] == pytest.approx(facts["metric"]["val/mse"]["after"])


def test_tensorboard_has_recipe_table_and_paths_as_text(board):
    folder, above, below = board
    texts = {tag: below.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in below.Tags()["tensors"]}
    assert texts.keys() == {f"compress/{name}/text_summary" for name in ("recipe", "files", "modules")}
    recipe = texts["compress/recipe/text_summary"].removeprefix("```yaml\n").removesuffix("```")
    assert yaml.safe_load(recipe)["modifiers"]["QuantizationModifier"]["scheme"] == "W8A16"
    header, _, *rows = texts["compress/modules/text_summary"].splitlines()
    cells = [dict(zip(header.split(" | "), row.split(" | "), strict=True)) for row in rows]
    assert [cell["| module"] for cell in cells] == ["| 0", "| 2"]
    assert {cell["technique"] for cell in cells} == {"rtn"}
    assert f"`{folder / 'compressed'}`" in texts["compress/files/text_summary"]
    assert {"compress/bits_per_weight", "compress/modules"} <= set(above.Tags()["scalars"])


def test_a_long_table_says_how_many_rows_it_leaves_out(tmp_path):
    ledger = Ledger()
    for number in range(trackers.TEXT_ROWS + 3):
        ledger.add(f"layers.{number}", "gptq", error=0.123456, flag="a | b")
    text = trackers._markdown(*trackers.Outcome(ledger, {}, [], 0).table()).splitlines()
    assert len(text) == 2 + trackers.TEXT_ROWS + 2
    assert text[0] == "| module | technique | error | flags |"
    assert text[2] == "| layers.0 | gptq | 0.1235 | a / b |"
    assert text[-1] == "The first 500 of 503 rows; modules.csv in the report has all."


# -- the rules ---------------------------------------------------------------------------------------------------------


def test_only_files_of_this_run_are_logged(tmp_path):
    for name in ("index.html", "notes.html", "modules.csv"):
        (tmp_path / name).write_text("old")
    earlier = trackers.file_versions(tmp_path)
    replacement = tmp_path / "replacement"
    replacement.write_text("old")
    os.replace(replacement, tmp_path / "index.html")  # the same content and length, as a deterministic run writes it
    (tmp_path / "summary.json").write_text("{}")
    assert trackers.written_since(tmp_path, earlier) == [tmp_path / "index.html", tmp_path / "summary.json"]
    assert trackers.written_since(tmp_path / "absent", {}) == []


def test_a_part_that_fails_is_a_warning_and_costs_no_other(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("quota")

    loggers = [CSVLogger(tmp_path, name=name) for name in ("one", "two")]
    monkeypatch.setattr(trackers.Outcome, "config", property(refuse))
    with pytest.warns(UserWarning, match="the recipe in CSVLogger is not complete, while the compressed model is: Run"):
        run(tmp_path, *loggers)
    assert all("compress/modules" in Path(logger.log_dir, "metrics.csv").read_text() for logger in loggers)


def test_lightning_still_keeps_the_argument_by_which_weights_may_be_uploaded():
    """It has no public name; in another one the folder would never be logged."""
    assert all("_log_model" in kind.__init__.__code__.co_names for kind in (WandbLogger, MLFlowLogger))


# -- W&B and MLflow ----------------------------------------------------------------------------------------------------


def weights_of(names) -> list[str]:
    return [name for name in names if name.endswith((".safetensors", ".ckpt"))]


@pytest.fixture
def mlflow(monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # mlflow-skinny has no database
    return pytest.importorskip("mlflow")


def wandb_records(folder: Path) -> Iterator[Any]:
    """Records of an offline run: a log of LevelDB in blocks of 32 KiB, of checksum, length, kind and piece."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    content, place, pieces = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if (rest := 32768 - place % 32768) < 7:
            place += rest
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        pieces += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield wandb_internal_pb2.Record.FromString(pieces)
            pieces = b""


@pytest.mark.trackers
@pytest.mark.parametrize("log_model", [False, True])
def test_wandb_gets_config_table_page_and_weights_only_on_demand(tmp_path, monkeypatch, log_model):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staging"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    logger = WandbLogger(save_dir=tmp_path, offline=not log_model, log_model=log_model)
    run(tmp_path, logger)
    config = dict(logger.experiment.config)
    assert {name: config[name] for name in CONFIG} == CONFIG
    logger.experiment.finish()
    wandb.teardown()  # the process that writes ends
    (files,) = tmp_path.glob("wandb/offline-run-*/files")
    (table,) = files.glob("media/table/compress/modules*.json")
    content = json.loads(table.read_text())
    assert [row[content["columns"].index("module")] for row in content["data"]] == ["0", "2"]
    (page,) = files.glob("media/html/compress/index*.html")
    assert page.read_text() == (tmp_path / "report" / "index.html").read_text()
    artifacts = {}
    for record in wandb_records(tmp_path):
        request = record.request.log_artifact.artifact if record.HasField("request") else record.artifact
        if request.name:
            artifacts[request.name] = (request.type, [entry.path for entry in request.manifest.contents])
    run_id = logger.version
    kind, names = artifacts[f"compression-report-{run_id}"]
    assert kind == "report"
    assert {"index.html", "modules.csv", "summary.json"} <= set(names)
    if log_model:
        kind, names = artifacts[f"compressed-{run_id}"]
        assert kind == "model"
        assert sorted(names) == sorted(path.name for path in (tmp_path / "compressed").iterdir())
    else:
        assert weights_of(name for _, names in artifacts.values() for name in names) == []


@pytest.mark.trackers
@pytest.mark.parametrize("log_model", [False, True])
def test_mlflow_gets_parameters_files_and_weights_only_on_demand(tmp_path, mlflow, log_model):
    logger = MLFlowLogger("test", tracking_uri=f"file:{tmp_path / 'mlruns'}", log_model=log_model)
    run(tmp_path, logger)
    client = mlflow.MlflowClient(f"file:{tmp_path / 'mlruns'}")
    data = client.get_run(logger.run_id).data
    assert {name: str(value) for name, value in CONFIG.items()}.items() <= data.params.items()
    assert data.metrics["compress/model_bytes_after"] == summary(tmp_path)["model_bytes_after"]
    report = {file.path for file in client.list_artifacts(logger.run_id, "compress")}
    assert {f"compress/{name}" for name in ("index.html", "modules.csv", "summary.json")} <= report
    root = Path(client.get_run(logger.run_id).info.artifact_uri.removeprefix("file:"))
    stored = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
    assert ("compressed/model.safetensors" in stored) == log_model
    if not log_model:
        assert weights_of(stored) == []


@pytest.mark.trackers
def test_mlflow_takes_names_of_modifiers_that_it_does_not_allow(tmp_path, mlflow):
    logger = MLFlowLogger("test", tracking_uri=f"file:{tmp_path / 'mlruns'}")
    facts = {"recipe": "x", "modifiers": {"GPTQModifier#2": {"scheme": "W8"}}, "metric": {}, "seconds": {}}
    trackers.log([logger], trackers.Outcome(Ledger(), facts, [], 0))
    data = mlflow.MlflowClient(f"file:{tmp_path / 'mlruns'}").get_run(logger.run_id).data
    assert data.params == {"compress/recipe": "x", "compress/GPTQModifier_2/scheme": "W8"}
