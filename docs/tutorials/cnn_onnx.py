# %% [markdown]
# # A convolutional net in int8 for ONNX Runtime
#
# A small convolutional net learns scikit-learn's digits. Static int8 (weights and inputs as 8-bit integers, scales from
# a few batches) makes its file a third as large, and ONNX Runtime executes it with integer arithmetic. Needs the
# extra `onnx` and `pip install scikit-learn`; a minute on a CPU.

# %%
import logging
import time
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
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
labels = torch.tensor(digits.target)
order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
train = TensorDataset(images[order[:-600]], labels[order[:-600]])
test_images, test_labels = images[order[-600:]], labels[order[-600:]]


def stage(inputs, outputs):
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        features = [*stage(1, 32), *stage(32, 64), nn.MaxPool2d(2), *stage(64, 64), nn.AdaptiveAvgPool2d(1)]
        self.net = nn.Sequential(*features, nn.Flatten(), nn.Linear(64, 10))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


lightning.seed_everything(0, verbose=False)
module = Classifier()
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
trainer = lightning.Trainer(max_epochs=10, accelerator="cpu", **quiet)
trainer.fit(module, DataLoader(train, 64, shuffle=True, drop_last=True))
model = module.net.eval()
print(f"dense: {100 * (model(test_images).argmax(1) == test_labels).float().mean():.1f} %")

# %% [markdown]
# ## The dense model in ONNX
#
# `save` writes a model that is not compressed, too. The sample is a batch of real inputs: its first dimension becomes a
# dynamic one, and the file is run in ONNX Runtime and compared with the model before the folder appears.

# %%
from lightning_compress import compress, save

dense_file = save(model, "dense", format="onnx", sample=images[:64]) / "model.onnx"

# %% [markdown]
# ## Static int8
#
# `int8_static` folds BatchNorm into the convolutions, observes the inputs of each layer on the calibration batches, and
# rounds. It changes the model in place.

# %%
compress(model, "int8_static", list(train.tensors[0][:512].split(64)))
print(f"int8: {100 * (model(test_images).argmax(1) == test_labels).float().mean():.1f} %")
int8_file = save(model, "int8", format="onnx", sample=images[:64]) / "model.onnx"

# %% [markdown]
# ## In ONNX Runtime
#
# Accuracy, bytes, and CPU time of the 600 images, the two models in turns, on one thread.

# %%
import onnxruntime


def session(file):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def run(runtime):
    began = time.process_time()
    (logits,) = runtime.run(None, {runtime.get_inputs()[0].name: test_images.numpy()})
    return torch.from_numpy(logits), time.process_time() - began


sessions = {"dense": session(dense_file), "int8": session(int8_file)}
seconds = {name: [] for name in sessions}
for _ in range(30):
    for name, runtime in sessions.items():
        logits, took = run(runtime)
        seconds[name].append(took)
for name, file in (("dense", dense_file), ("int8", int8_file)):
    right = (run(sessions[name])[0].argmax(1) == test_labels).float().mean()
    print(f"{name:6}{100 * right:5.1f} %  {file.stat().st_size:8,} bytes  {1e3 * min(seconds[name]):5.1f} ms")
print(f"int8 is {min(seconds['dense']) / min(seconds['int8']):.1f} times as fast")

# %% [markdown]
# Next: `gptq_int8_static` and `qat_int8_static` where rounding loses accuracy
# ([static int8](../quantization.md#static-int8)); after a run of the callback the same `save` writes the trained model.
