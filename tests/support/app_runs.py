"""Runs of train.py that can be killed: this process imports it once, and forks a run for each line.

python -m tests.support.app_runs
> ["+compress=gptq_w4", "hydra.run.dir=/somewhere"]      overrides as JSON, on stdin
< {"signal": 0, "failed": ""}                            the signal that ended the run, and a traceback, on stdout
"""

import json
import os
import sys
import tempfile
import traceback
from pathlib import Path

import lightning  # noqa: F401  (imported before forking)
import transformers  # noqa: F401
from hydra import compose, initialize_config_dir
from omegaconf import open_dict

import train
from lightning_compress import CompressionCallback  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]


def run(overrides: list[str], folder: str) -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", overrides, return_hydra_config=True)
    with open_dict(cfg):
        cfg.paths.update(work_dir=folder, output_dir=folder)
        del cfg["hydra"]
    train.train(cfg)


def attempt(overrides: list[str], folder: str) -> dict[str, object]:
    with tempfile.NamedTemporaryFile("r") as told:
        if child := os.fork():
            status = os.waitpid(child, 0)[1]
            return {"signal": os.WTERMSIG(status), "failed": told.read()}
        os.dup2(2, 1)  # tables and logs
        try:
            run(overrides, folder)
        except BaseException:
            Path(told.name).write_text(traceback.format_exc())
        os._exit(0)


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(attempt(*json.loads(line))), flush=True)
