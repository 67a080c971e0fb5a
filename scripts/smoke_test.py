"""Compresses, saves and loads a tiny model with the installed package:  python -P scripts/smoke_test.py"""

import tempfile
from pathlib import Path

import torch
from torch import nn

import lightning_compress

model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 8))
x = torch.randn(32, 128)
lightning_compress.compress(model, "gptq_w4", [x[:16], x[16:]])
assert all(len(row.unique()) <= 16 for row in model[0].weight), "4-bit weights have more than 16 values in a row"
with tempfile.TemporaryDirectory() as folder:
    lightning_compress.save(model, folder)
    fresh = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 8))
    loaded = lightning_compress.load(folder, model=fresh, packed=False)
    assert torch.equal(loaded(x), model(x)), "the loaded model computes something else"
print("lightning_compress", lightning_compress.__version__, "of", Path(lightning_compress.__file__).parent)
