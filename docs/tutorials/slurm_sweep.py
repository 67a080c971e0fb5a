# %% [markdown]
# # A sweep over recipes, here and on a SLURM cluster
#
# Which recipe loses least? A sweep compresses with each, and ends in one table of size, metric and seconds. This page
# writes a small Hydra app, runs the sweep on this machine with submitit's local launcher, and shows what a cluster
# gets: the resources of a job array, and a script for `sbatch`. Nothing is submitted. Needs the extra `slurm` and
# `pip install scikit-learn`; a minute on a CPU.
#
# ## An app
#
# Any app that builds the entries of `callbacks` from its config will do, such as the lightning-hydra-template.
# Nothing in it knows about compression.

# %%
from pathlib import Path

Path("train.py").write_text("""\
import hydra
import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Classifier(lightning.LightningModule):
    def __init__(self, width):
        super().__init__()
        layers = [nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)]
        self.net = nn.Sequential(*layers)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.training_step(batch, batch_idx), batch_size=len(batch[1]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Digits(lightning.LightningDataModule):
    def setup(self, stage):
        images, labels = load_digits(return_X_y=True)
        x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
        self.train, self.val = TensorDataset(x[:1200], y[:1200]), TensorDataset(x[1200:], y[1200:])

    def train_dataloader(self):
        return DataLoader(self.train, 64, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, 200)


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg):
    lightning.seed_everything(cfg.seed, verbose=False)
    callbacks = [hydra.utils.instantiate(entry) for entry in (cfg.get("callbacks") or {}).values()]
    trainer = hydra.utils.instantiate(cfg.trainer, callbacks=callbacks)
    trainer.fit(Classifier(cfg.width), Digits())


main()
""")
Path("conf").mkdir()
Path("conf/train.yaml").write_text("""\
seed: 0
width: 128
trainer:
  _target_: lightning.Trainer
  default_root_dir: ${hydra:runtime.output_dir}
  max_epochs: 20
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
""")

# %% [markdown]
# ## The sweep, here
#
# `+compress=A,B` is one job for each recipe. The quotes keep brackets from the shell: `[smoothquant,gptq_w8a8]` would
# be one job with both. The `submitit_local` launcher starts the jobs side by side; without it they run one after the
# other.

# %%
import subprocess
import sys


def run(*words):
    result = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(result.stdout + result.stderr)
    return result.stdout


run("train.py", "-m", "hydra/launcher=submitit_local", "hydra.sweep.dir=sweep", "+compress=rtn_w2,gptq_w2")
print(run("-m", "lightning_compress.cli", "sweep", "sweep", "--mode", "min"))

# %% [markdown]
# On the command line this is `lightning-compress sweep sweep --mode min`. `sweep/sweep.csv` and `sweep/sweep.png`
# hold the same. Every job has a folder with its config, `compressed/` and `report/`.
#
# ## The sweep, on a cluster
#
# The same command with another launcher submits a job array, waits for it, and each job is requeued at its time limit
# and goes on where it was:
#
# ```
# python train.py -m hydra/launcher=submitit_slurm hydra.launcher.max_num_timeout=100 +compress=rtn_w2,gptq_w2
# ```
#
# What would be asked of the cluster, without asking:

# %%
resources = ["hydra.launcher.timeout_min=240", "hydra.launcher.gpus_per_node=1", "hydra.launcher.max_num_timeout=100"]
launcher = ["hydra/launcher=submitit_slurm", *resources]
print(run("train.py", *launcher, "--cfg", "hydra", "--package", "hydra.launcher"))

# %% [markdown]
# ## One run, by sbatch
#
# A script for `sbatch`: SIGUSR1 two minutes before the limit makes the run save, and Slurm starts it again in the
# same folder, which is why `hydra.run.dir` names the job and not the time.

# %%
script = """\
#!/usr/bin/env bash
#SBATCH --job-name=compress
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --gpus-per-node=1
#SBATCH --time=04:00:00
#SBATCH --signal=SIGUSR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
srun python train.py hydra.run.dir=logs/$SLURM_JOB_ID +compress=gptq_w4 "$@"
"""
Path("compress.sbatch").write_text(script)
subprocess.run(["bash", "-n", "compress.sbatch"], check=True)
print("sbatch compress.sbatch seed=1")

# %% [markdown]
# Next: several nodes, what happens at the time limit, and troubleshooting are on the page about [SLURM](../slurm.md).
