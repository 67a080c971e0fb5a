"""The wheel, installed beside an app that never heard of this package: ``+compress=gptq_w4`` works there.

The fresh environment reads torch and the rest from the one that runs the tests, through a path file; what it has of
this package is the installed wheel alone, and the repository is not on its path.
"""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.packaging

ROOT = Path(__file__).resolve().parents[1]
Run = Callable[..., "subprocess.CompletedProcess[str]"]

APP = {
    "src/train.py": '''\
"""An app in the manner of lightning-hydra-template; nothing in it knows about compression."""
import hydra
import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(lightning.LightningModule):
    def __init__(self, lr):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch, batch_idx):
        return self._loss("train", batch)

    def validation_step(self, batch, batch_idx):
        self._loss("val", batch)

    def test_step(self, batch, batch_idx):
        self._loss("test", batch)

    def forward(self, x):
        return self.net(x)

    def _loss(self, stage, batch):
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log(f"{stage}/loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), self.hparams.lr)


class Data(lightning.LightningDataModule):
    def __init__(self, batch_size):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        x, y = torch.randn(64, 128, generator=generator), torch.randint(10, (64,), generator=generator)
        self.dataset, self.batch_size = TensorDataset(x, y), batch_size

    def train_dataloader(self):
        return DataLoader(self.dataset, self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.dataset, self.batch_size)

    test_dataloader = val_dataloader


@hydra.main(version_base="1.3", config_path="../configs", config_name="train.yaml")
def main(cfg):
    lightning.seed_everything(cfg.seed)
    datamodule = hydra.utils.instantiate(cfg.data)
    model = hydra.utils.instantiate(cfg.model)
    callbacks = [hydra.utils.instantiate(c) for c in (cfg.get("callbacks") or {}).values() if "_target_" in c]
    trainer = hydra.utils.instantiate(cfg.trainer, callbacks=callbacks, logger=False)
    trainer.fit(model, datamodule=datamodule)
    trainer.test(model, datamodule=datamodule, ckpt_path=trainer.checkpoint_callback.best_model_path)
    values = [len(row.unique()) for layer in (model.net[0], model.net[2]) for row in layer.weight]
    print("most values in a row:", max(values))


if __name__ == "__main__":
    main()
''',
    "src/show.py": '''\
"""Composes the same config and ends: what Hydra itself does with it needs no torch."""
import hydra

hydra.main(version_base="1.3", config_path="../configs", config_name="train.yaml")(lambda cfg: None)()
''',
    "configs/train.yaml": """\
defaults:
  - _self_
  - model: net
  - data: noise
  - callbacks: default
  - trainer: default

seed: 1
""",
    "configs/model/net.yaml": "_target_: __main__.Net\nlr: 0.001\n",
    "configs/data/noise.yaml": "_target_: __main__.Data\nbatch_size: 16\n",
    "configs/callbacks/default.yaml": """\
model_checkpoint:
  _target_: lightning.pytorch.callbacks.ModelCheckpoint
  dirpath: ${hydra:runtime.output_dir}/checkpoints
  monitor: val/loss
""",
    "configs/trainer/default.yaml": """\
_target_: lightning.pytorch.trainer.Trainer
default_root_dir: ${hydra:runtime.output_dir}
accelerator: cpu
devices: 1
max_epochs: 1
enable_progress_bar: false
enable_model_summary: false
""",
}


def build(kind: str, folder: Path) -> Path:
    """What hatchling makes of this tree."""
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.iterdir())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment with the wheel in it."""
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    venv.create(folder, symlinks=True)
    interpreter = folder / "bin" / "python"
    install = ["-m", "pip", "--python", str(interpreter), "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    done = subprocess.run([sys.executable, *install], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lib = f"python{sys.version_info.major}.{sys.version_info.minor}"
    shared = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    (folder / "lib" / lib / "site-packages" / "shared.pth").write_text("\n".join(shared) + "\n")
    return interpreter


@pytest.fixture(scope="module")
def run(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs the fresh interpreter inside the foreign app's folder, away from the repository."""
    app = tmp_path_factory.mktemp("app")
    for name, text in APP.items():
        (app / name).parent.mkdir(parents=True, exist_ok=True)
        (app / name).write_text(text)
    environ = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}

    def fresh(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(python), *arguments], cwd=app, env=environ, capture_output=True, text=True, check=False
        )

    return fresh


# -- what is in the wheel --------------------------------------------------------------------------------------------


def test_the_wheel_holds_the_package_its_recipes_and_the_plugin_and_no_more(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    recipes = {f"lightning_compress/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / "conf/compress").rglob("*.yaml")}
    assert recipes <= names
    assert "lightning_compress/conf/compress/recipe.schema.json" in names
    assert {"lightning_compress/py.typed", "hydra_plugins/lightning_compress_searchpath.py"} <= names
    ops = ROOT / "lightning_compress/ops"
    sources = {p.relative_to(ROOT).as_posix() for pattern in ("*.cu", "*.json") for p in ops.rglob(pattern)}
    assert sources  # read when a kernel is compiled or launched
    assert sources <= names
    assert "hydra_plugins/__init__.py" not in names  # a namespace package, shared with other plugins
    assert {n for n in names if n.endswith(".yaml")} == recipes  # the demo app's configs stay at home
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == {"lightning_compress", "hydra_plugins"}


def test_the_wheel_names_its_licence_its_plugin_and_its_python(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    info = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA")).rsplit("/", 1)[0]
    metadata = archive.read(f"{info}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata
    for extra in ("hf", "plot", "slurm", "loaders", "trackers", "sweep", "dev", "docs"):
        assert f"Provides-Extra: {extra}" in metadata
    entry_points = archive.read(f"{info}/entry_points.txt").decode()
    assert "[hydra.plugins]" in entry_points
    assert "[console_scripts]\nlightning-compress = lightning_compress.cli:main" in entry_points
    assert f"{info}/licenses/LICENSE" in archive.namelist()


def test_the_smoke_test_of_the_release_passes(run: Run) -> None:
    done = run("-P", str(ROOT / "scripts" / "smoke_test.py"))
    assert done.returncode == 0, done.stderr
    assert str(ROOT) not in done.stdout


def test_the_package_says_the_version_that_the_wheel_has(run: Run, wheel: Path) -> None:
    done = run("-c", "import lightning_compress as l; print(l.__version__, l.__file__)")
    version, file = done.stdout.split()
    assert f"-{version}-" in wheel.name
    assert not Path(file).is_relative_to(ROOT)


# -- what is in the sdist --------------------------------------------------------------------------------------------


def test_make_works_in_the_sdist(tmp_path: Path) -> None:
    """Its Makefile includes other files, and its targets run scripts."""
    with tarfile.open(build("sdist", tmp_path / "dist")) as archive:
        archive.extractall(tmp_path, filter="data")
    folder = next(path for path in tmp_path.iterdir() if path.name != "dist")
    command = ["make", "--no-print-directory", "help"]  # a make inside of make names its folder otherwise
    unpacked, here = (subprocess.run(command, cwd=f, capture_output=True, text=True) for f in (folder, ROOT))
    assert unpacked.stdout == here.stdout, unpacked.stderr
    assert "make demo" in unpacked.stdout
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    assert not [name for name in tracked if (ROOT / name).exists() and not (folder / name).exists()]


# -- beside a foreign app ----------------------------------------------------------------------------------------------


def test_compress_works_in_an_app_that_was_not_edited(run: Run, tmp_path: Path) -> None:
    done = run("src/train.py", "+compress=gptq_w4", f"hydra.run.dir={tmp_path}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "compressed" / "model.safetensors").stat().st_size > 0
    assert int(done.stdout.rsplit("most values in a row:", 1)[1]) <= 16  # after the test at the end, too
    config = yaml.safe_load((tmp_path / ".hydra" / "config.yaml").read_text())
    assert list(config["callbacks"]) == ["model_checkpoint", "compress"]


def test_a_sweep_there_is_compared_by_the_console_command(run: Run, python: Path, tmp_path: Path) -> None:
    done = run("src/train.py", "-m", "+compress=rtn_w2,[wanda_2of4,gptq_w4]", f"hydra.sweep.dir={tmp_path}")
    assert done.returncode == 0, done.stdout + done.stderr
    command = [str(python.with_name("lightning-compress")), "sweep", "."]
    table = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "results of 2 of 2 jobs; val/loss (smaller is better)" in table  # what its checkpoint callback monitors
    rows = [
        line.split(",") for line in (tmp_path / "sweep.csv").read_text().replace("[wanda_2of4,", "[wanda_2of4;").split()
    ]
    assert [row[:3] for row in rows[1:]] == [["0", "rtn_w2", "val/loss"], ["1", '"[wanda_2of4;gptq_w4]"', "val/loss"]]


def test_the_app_without_compress_is_as_before(run: Run, tmp_path: Path) -> None:
    done = run("src/train.py", f"hydra.run.dir={tmp_path}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / "compressed").exists()
    assert int(done.stdout.rsplit("most values in a row:", 1)[1]) > 16


def test_recipes_stack_and_change_there(run: Run) -> None:
    at = "callbacks.compress.modifiers.gptq"
    done = run("src/show.py", "+compress=[rtn_w8,gptq_w4]", f"{at}.scheme=W8A16", f"{at}.actorder=null", "--cfg=job")
    assert done.returncode == 0, done.stderr
    modifiers = yaml.safe_load(done.stdout)["callbacks"]["compress"]["modifiers"]
    assert list(modifiers) == ["rtn", "gptq"]
    assert (modifiers["gptq"]["scheme"], modifiers["gptq"]["actorder"]) == ("W8A16", None)


def test_the_app_sees_our_recipes_and_none_of_our_other_groups(run: Run) -> None:
    assert "lightning-compress" in run("src/show.py", "--info", "searchpath").stdout
    help_text = run("src/show.py", "--help").stdout
    assert "gptq_w4" in help_text
    assert "llama_demo" not in help_text


def test_the_plugin_brings_no_torch_into_other_apps(run: Run) -> None:
    """Composing a config, with the plugin at work, imports neither torch nor this package."""
    script = """
import sys
from hydra import compose, initialize_config_dir
with initialize_config_dir(sys.argv[1], version_base="1.3"):
    cfg = compose("train", ["+compress=gptq_w4"])
assert cfg.callbacks.compress._target_ == "lightning_compress.CompressionCallback"
print(sorted({"torch", "lightning", "lightning_compress", "numpy", "pydantic"} & set(sys.modules)))
"""
    app = Path(run("-c", "import os; print(os.getcwd())").stdout.strip())
    done = run("-c", script, str(app / "configs"))
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_importing_the_package_is_cheap(run: Run) -> None:
    done = run("-c", "import sys, lightning_compress; print(sorted({'torch', 'lightning', 'yaml'} & set(sys.modules)))")
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
