"""The tutorials run from top to bottom, and their notebooks hold the same code."""

import json
import logging

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from scripts import notebooks

pytest.importorskip("sklearn")


@pytest.fixture
def tiny_chat_model(tmp_path):
    """A folder with a Llama of random weights and a tokenizer of bytes, in place of a model from the hub."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(["</s>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, vocab_size=len(alphabet) + 1, num_hidden_layers=2, eos_token_id=0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    fast.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def usual_logging():
    """Tutorials silence loggers; later tests read them."""
    loggers = [logging.getLogger(name) for name in ("lightning_compress", "lightning.pytorch", "transformers")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


SLOW = {"slurm_sweep"}  # starts four processes that import torch
NAMES = [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in notebooks.names()]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("usual_logging")
@pytest.mark.parametrize("name", NAMES)
def test_a_tutorial_runs(name, tmp_path, monkeypatch, tiny_chat_model):
    monkeypatch.setenv("TUTORIAL_MODEL", str(tiny_chat_model))
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    printed = [output for cell, output in notebooks.run(name) if cell.kind == "code"]
    assert any(printed)


@pytest.mark.parametrize("name", notebooks.names())
def test_a_notebook_holds_the_cells_of_its_tutorial_and_what_they_print(name):
    stored = json.loads((notebooks.FOLDER / f"{name}.ipynb").read_text())["cells"]
    cells = notebooks.cells(name)
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in stored] == [(c.kind, c.text) for c in cells]
    assert any(cell.get("outputs") for cell in stored)
    assert "/tmp/" not in json.dumps(stored)


def test_a_cell_that_fails_names_its_tutorial(tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text("# %% [markdown]\n# # Title\n\n# %%\n1 / 0\n")
    monkeypatch.setattr(notebooks, "FOLDER", tmp_path)
    with pytest.raises(ZeroDivisionError) as error:
        list(notebooks.run("broken"))
    assert str(error.traceback[-1].path).endswith("broken.py, cell 1")
