"""Every modifier that acts after training, on two ranks: both end with one model, and none waits for the other."""

import faulthandler
import warnings
from types import SimpleNamespace

import pytest
import torch
from lightning import LightningModule
from torch import nn
from torch.utils.data import DataLoader
from transformers import PretrainedConfig

import lightning_compress as lc
from lightning_compress import CompressionCallback
from lightning_compress.team import Team
from lightning_compress.training.broadcast import send_weights
from lightning_compress.training.pruned_checkpoints import record_of
from tests.support.processes import run_processes
from tests.support.structure_runs import llama
from tests.support.training_runs import RoundingModifier, quiet
from tests.support.two_ranks import run_two_ranks

INT4 = {"scheme": "W4A16", "group_size": 16}
INT8 = {"scheme": "W8A16", "group_size": 8}
SECONDS = 240


class Language(LightningModule):
    """Learns the tokens it reads."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, batch_idx):
        return self.model(**batch, labels=batch["input_ids"]).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2)

    def train_dataloader(self):
        ids = torch.randint(0, 64, (8, 12), generator=torch.Generator().manual_seed(0))
        return DataLoader([{"input_ids": row} for row in ids], batch_size=2)


def mixture():
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads))


class Reader(nn.Module):
    """A GRU that reads tokens, with an attention over its states."""

    def __init__(self):
        super().__init__()
        self.embed, self.body = nn.Embedding(64, 32), nn.GRU(32, 32, batch_first=True)
        self.attention, self.head = nn.MultiheadAttention(32, 2, batch_first=True), nn.Linear(32, 64)
        self.config = PretrainedConfig()

    def forward(self, input_ids, labels=None):
        y = self.body(self.embed(input_ids))[0]
        logits = self.head(self.attention(y, y, y, need_weights=False)[0])
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return SimpleNamespace(logits=logits, loss=loss)


def tied():
    model = llama(num_hidden_layers=2, tie_word_embeddings=True)
    model.model.norm.weight.data.uniform_(0.5, 2.0)  # a gain that must go into the head alone
    return model


class Rebuilding(RoundingModifier):
    """Changes the module tree, and leaves no record of it."""

    def on_calibration_end(self, state, event, **kwargs):
        state.model.lm_head = nn.Linear(32, 64, bias=True)


CASES = {
    "round": (llama, lambda: lc.QuantizationModifier(scheme="W8A8", targets=["Linear"])),
    "gptq": (llama, lambda: lc.GPTQModifier(**INT4)),
    "gptq_experts": (mixture, lambda: lc.GPTQModifier(scheme="W8A8", ignore=["re:.*gate", "lm_head"])),
    "gptq_recurrent": (Reader, lambda: lc.GPTQModifier(**INT4, targets=["Linear", "GRU", "MultiheadAttention"])),
    "awq": (llama, lambda: lc.AWQModifier(**INT4, n_grid=2)),
    "smoothquant": (llama, lambda: lc.SmoothQuantModifier()),
    "equalization": (llama, lambda: lc.LogarithmicEqualizationModifier()),
    "autoround": (llama, lambda: lc.AutoRoundModifier(**INT4, iters=2)),
    "sparsegpt": (llama, lambda: lc.SparseGPTModifier(sparsity=0.5)),
    "wanda": (llama, lambda: lc.WandaPruningModifier(sparsity=0.5)),
    "magnitude": (llama, lambda: lc.MagnitudePruningModifier(final_sparsity=0.5)),
    "kv_cache": (llama, lambda: lc.KVCacheModifier()),
    "layers": (llama, lambda: lc.DepthPruningModifier(layers=[0])),
    "depth": (llama, lambda: lc.DepthPruningModifier(count=1)),
    "mlp": (llama, lambda: lc.StructuredPruningModifier(ratio=0.25)),
    "heads": (llama, lambda: [lc.StructuredPruningModifier(dimension="heads", ratio=0.5), lc.GPTQModifier(**INT8)]),
    "reap": (mixture, lambda: lc.REAPModifier(sparsity=0.5)),
    "rotation": (tied, lambda: lc.RotationModifier()),
    "rotation_online": (llama, lambda: lc.RotationModifier(rotations=["R1", "R4"], allow_online=True)),
    "spinquant": (tied, lambda: lc.SpinQuantModifier(learn=True, learn_steps=2)),
    "quip": (llama, lambda: lc.QuIPModifier(allow_online=True)),
    "rebuilding": (llama, lambda: Rebuilding()),
}  # fmt: skip
SMALLER = {"layers", "depth", "mlp", "heads", "reap"}


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """What each rank has after each case."""
    folder = tmp_path_factory.mktemp("ranks")

    def work(rank):
        faulthandler.dump_traceback_later(SECONDS - 5, file=(folder / f"stuck{rank}.txt").open("w"))
        warnings.simplefilter("ignore")
        for name, (build, modifiers) in CASES.items():
            torch.manual_seed(0)
            module = Language(build())
            before = sum(p.numel() for p in module.parameters())
            (own := folder / name).mkdir(exist_ok=True)
            callback = CompressionCallback(modifiers(), calibration_batches=2, evaluate=False)
            trainer = quiet(own, callback, strategy="ddp", devices=2, enable_checkpointing=False)
            error = ""
            try:
                trainer.fit(module)
            except Exception as raised:
                error = str(raised)
            ids = torch.arange(12)[None]
            with torch.no_grad():
                logits = module.model.eval()(input_ids=ids).logits
            facts = {"cuts": record_of(module.model), "config": module.model.config.to_dict(), "error": error}
            weights = module.model.state_dict()
            after = sum(p.numel() for p in module.parameters())
            saved = {"logits": logits, "weights": weights, "before": before, "after": after, **facts}
            torch.save(saved, own / f"rank{rank}.pt")

    failures = run_two_ranks(work, folder, SECONDS)
    stuck = [path.read_text() for path in sorted(folder.glob("stuck*.txt"))]
    return folder, "\n".join([*failures, *stuck])


def read(ends, name):
    folder, failures = ends
    paths = [folder / name / f"rank{rank}.pt" for rank in (0, 1)]
    assert all(path.exists() for path in paths), f"{name} did not end on both ranks: {failures}"
    return [torch.load(path, weights_only=False) for path in paths]


@pytest.mark.parametrize("name", [name for name in CASES if name != "rebuilding"])
def test_two_ranks_end_with_one_model(ends, name):
    zero, one = read(ends, name)
    assert zero["error"] == one["error"] == ""
    assert torch.equal(zero["logits"], one["logits"])
    assert zero["weights"].keys() == one["weights"].keys()
    assert all(torch.equal(zero["weights"][key], one["weights"][key]) for key in zero["weights"])
    assert (zero["cuts"], zero["config"]) == (one["cuts"], one["config"])
    assert (one["after"] < one["before"]) == (name in SMALLER)
    assert (one["after"] > one["before"]) == (name in ("rotation", "spinquant"))  # untied


def test_what_no_rank_can_repeat_is_an_error_on_both(ends):
    for end in read(ends, "rebuilding"):
        assert end["error"] == (
            "after training the model was changed on rank 0 alone, and rank 1 cannot follow: tensors differ, such as "
            "lm_head.bias; change the model at set-up, which all ranks do, or train on one device"
        )


def sending(rank):
    module = nn.BatchNorm1d(2)
    module.running_mean += rank
    module.weight.data += rank
    module.num_batches_tracked += rank
    send_weights(Team.present(), module)
    return {name: tensor.tolist() for name, tensor in module.state_dict().items()}


def test_every_rank_gets_the_parameters_and_buffers_of_rank_0(tmp_path):
    zero, one = run_processes(sending, tmp_path)
    assert zero == one
    assert one["running_mean"] == [0, 0]
