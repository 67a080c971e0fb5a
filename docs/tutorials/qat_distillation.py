# %% [markdown]
# # Quantization-aware training with distillation, in your own LightningModule
#
# A small network learns scikit-learn's digits. Rounding its weights to 2 bits costs accuracy; training goes on
# through the rounding, with the trained network as teacher, and wins most of it back. Nothing in the LightningModule
# changes: all of it is one callback. Needs `pip install scikit-learn`; under a minute on a CPU.

# %%
import copy
import logging
import warnings

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
labels = torch.tensor(digits.target)
order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
train = TensorDataset(images[order[:-600]], labels[order[:-600]])
test = TensorDataset(images[order[-600:]], labels[order[-600:]])

# %% [markdown]
# The LightningModule is yours, as it is. `val/accuracy` is what the report will compare before and after.


# %%
class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        accuracy = (self(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("val/accuracy", 100 * accuracy, batch_size=len(batch[1]))

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def trainer(epochs, *callbacks):
    return lightning.Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        accelerator="cpu",
        default_root_dir="qat",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def accuracy(module):
    return trainer(1).validate(module, DataLoader(test, 200), verbose=False)[0]["val/accuracy"]


lightning.seed_everything(0, verbose=False)
module = Classifier()
loader = DataLoader(train, 64, shuffle=True)
trainer(20).fit(module, loader)
print(f"dense: {accuracy(module):.1f} %")

# %% [markdown]
# ## 2 bits by rounding
#
# `compress` works on any `nn.Module`. The weights get four values each, with a scale for 32 columns.

# %%
from lightning_compress import QuantizationModifier, compress

scheme = {"targets": ["Linear"], "scheme": "W2A16", "group_size": 32}
rounded = copy.deepcopy(module)
compress(rounded.net, QuantizationModifier(**scheme))
print(f"2 bits, rounded: {accuracy(rounded):.1f} %")

# %% [markdown]
# ## 2 bits by training
#
# `QATModifier` rounds the weights in every forward pass, and the gradient passes straight through.
# `DistillationModifier` takes a copy of the model at the start of training as teacher: so start from the trained
# module. Its loss is added to yours.

# %%
from lightning_compress import CompressionCallback, DistillationModifier, QATModifier

callback = CompressionCallback([DistillationModifier(teacher="self"), QATModifier(**scheme)])
trainer(20, callback).fit(module, loader, DataLoader(test, 200))
print(f"2 bits, trained: {accuracy(module):.1f} %")

# %% [markdown]
# ## What is on the disk
#
# `qat/compressed` holds the packed weights, `qat/report/index.html` the run on one page. `load` fills a new network
# from the folder:

# %%
from pathlib import Path

from lightning_compress import load

again = load("qat/compressed", Classifier().net)
same = (again(images[:64]) - module.net.eval()(images[:64])).abs().max().item()
size = Path("qat/compressed/model.safetensors").stat().st_size
dense = sum(4 * p.numel() for p in module.net.parameters())
print(f"{dense:,} bytes -> {size:,}; largest difference of a logit after loading: {same:.1g}")
assert same < 1e-4

# %% [markdown]
# Next: other bit widths are another `scheme` ([modifiers](../modifiers.md#schemes)); the same run in a Hydra app is
# `python train.py '+compress=[distill,qat_w2]'`. All arguments: [while training](../training.md).
