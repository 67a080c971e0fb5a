"""A log that several ranks have written: any number of ranks goes on from it, to the bits of one process."""

import hashlib
import json
import warnings
from functools import partial

import pytest
import torch

from lightning_compress.calibration.sequential import calibrate
from lightning_compress.core import Ledger, Lifecycle, State
from lightning_compress.modifiers.gptq.modifier import GPTQModifier
from lightning_compress.modifiers.sparsegpt import SparseGPTModifier
from lightning_compress.resume.folder_log import FolderLog
from lightning_compress.team import Team
from tests.support.calibration_models import C, Layered, seeded
from tests.support.processes import run_processes

INT4 = {"weights": {"num_bits": 4, "strategy": "group", "group_size": 8}}
RECIPES = {
    "gptq": lambda: GPTQModifier(scheme=INT4),
    "owl": lambda: SparseGPTModifier(sparsity_profile="owl", sparsity=0.5, ignore=["head", "embed"]),
}


class Stop(BaseException):
    """In place of a kill."""


def calibrated(rank, recipe, folder, stop):
    """(checksum of weights and ledger, titles that it stored); None where it was stopped after ``stop`` groups."""
    stored = []

    class Log(FolderLog):
        def store(self, title, modules):
            super().store(title, modules)
            stored.append(title)
            if len(stored) == stop:
                raise Stop

    model, lifecycle, team = seeded(Layered), Lifecycle([RECIPES[recipe]()]), Team.of_processes()
    state, log = State(model, ledger=Ledger(), team=team), Log(folder)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(2, 12, C, generator=generator) for _ in range(5)]
    lifecycle.initialize(state)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            calibrate(lifecycle, state, batches, log=log)
    except Stop:
        return None
    finally:
        log.close()
        team.close()
    rows = sorted(json.dumps({k: v for k, v in row.items() if k != "seconds"}) for row in state.ledger.state_dict())
    values = b"".join(value.numpy().tobytes() for value in model.state_dict().values())
    return hashlib.sha256(values + "".join(rows).encode()).hexdigest(), stored


@pytest.mark.parametrize("recipe", RECIPES)
def test_another_number_of_ranks_goes_on(tmp_path, recipe):
    (expected, titles) = calibrated(0, recipe, tmp_path / "one", None)
    two = run_processes(partial(calibrated, recipe=recipe, folder=tmp_path / "log", stop=2), tmp_path / "a")
    assert two == [None, None]
    assert calibrated(0, recipe, tmp_path / "log", 1) is None
    three = run_processes(
        partial(calibrated, recipe=recipe, folder=tmp_path / "log", stop=None), tmp_path / "b", size=3
    )
    assert three == [(expected, titles[3:])] * 3
