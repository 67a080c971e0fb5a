# %% [markdown]
# # A language model in 4 bits, and a chat with it
#
# GPTQ rounds the weights of SmolLM2-135M to 4 bits and compensates the errors on a little text. The folder loads in
# plain `transformers`, in vLLM, and with `load`, which computes on the packed weights. Two minutes on a CPU; needs
# the extra `hf`.
#
# The model is downloaded from the Hugging Face hub. `TUTORIAL_MODEL` names another one, or a folder.

# %%
import inspect
import logging
import os
import warnings

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

warnings.filterwarnings("ignore")
logging.getLogger("lightning_compress").setLevel(logging.ERROR)

name = os.environ.get("TUTORIAL_MODEL", "HuggingFaceTB/SmolLM2-135M-Instruct")
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()

# %% [markdown]
# ## Text to calibrate with
#
# Any text that resembles what the model will read. Here: documentation of Python's standard library, 16 rows of 256
# tokens; other modules give the text on which perplexity is measured.

# %%
import argparse
import asyncio
import collections
import decimal
import email.message
import json
import logging.handlers
import pathlib
import threading


def text(*modules):
    members = [member for module in modules for _, member in inspect.getmembers(module, inspect.isclass)]
    return "\n\n".join(filter(None, (inspect.getdoc(part) for m in members for part in (m, *vars(m).values()))))


def rows(text, count, length=256):
    ids = tokenizer(text)["input_ids"]
    return torch.tensor(ids[: count * length]).view(count, length)


calibration = rows(text(argparse, asyncio, collections, decimal, email.message), 16).split(1)
held_out = rows(text(json, logging.handlers, pathlib, threading), 8)


@torch.no_grad()
def perplexity(model):
    losses = [model(input_ids=row[None], labels=row[None]).loss for row in held_out]
    return torch.stack(losses).float().mean().exp().item()


before = perplexity(model)
print(f"dense: perplexity {before:.2f}, {model.get_memory_footprint() / 1e6:.0f} MB")

# %% [markdown]
# ## The plan
#
# What the recipe would do and take, before it does it. The model does not change.

# %%
from lightning_compress import compress, load, save

print(compress(model, "gptq_w4", calibration, plan=True))

# %% [markdown]
# ## Compress and save
#
# `compress` works in place. Each layer gets the largest group of 128, 64 or 32 columns that divides its width.

# %%
compress(model, "gptq_w4", calibration)
folder = save(model, "smollm2-w4", tokenizer=tokenizer)
size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
after = perplexity(model)
print(f"4 bits: perplexity {after:.2f}, {size / 1e6:.0f} MB on disk")
assert after < 1.5 * before

# %% [markdown]
# ## Chat
#
# On a CPU the packed products of 4-bit weights exist in bfloat16.
# `AutoModelForCausalLM.from_pretrained("smollm2-w4")` would give the same weights, dense.

# %%
packed = load(folder, dtype=torch.bfloat16)


def chat(question):
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = packed.generate(**prompt, max_new_tokens=60, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


print(chat("What is the capital of France?"))

# %%
print(chat("Write one sentence about the sea."))

# %% [markdown]
# Next: `vllm serve smollm2-w4`; fewer bits, or 8 ([which recipe](../choosing.md)); a model that is larger than memory
# ([from folder to folder](../export.md#from-python)).
