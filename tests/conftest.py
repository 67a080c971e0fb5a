"""The demo app's config, composed as ``python train.py`` composes it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

ROOT = Path(__file__).resolve().parents[1]

Compose = Callable[..., DictConfig]


@pytest.fixture(scope="session", autouse=True)
def no_verification() -> Iterator[None]:
    """``verify="auto"`` starts no process (seconds each) in these tests; True does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_compress.export.verify.AUTO_BYTES", -1)
        yield


@pytest.fixture
def app_config(tmp_path: Path) -> Iterator[Compose]:
    """``app_config("+compress=gptq_w4", ...)``: the config of a run in ``tmp_path``."""

    def composed(*overrides: str) -> DictConfig:
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            cfg = compose("train", [*overrides, f"hydra.run.dir={tmp_path}"], return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        with open_dict(cfg):
            cfg.paths.update(work_dir=str(tmp_path), output_dir=str(tmp_path / "run"))
            del cfg["hydra"]
        return cfg

    yield composed
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None
