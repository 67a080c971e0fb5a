"""Numbers before and after."""

import json
import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torchmetrics import MaxMetric, MeanMetric, MeanSquaredError, MetricCollection

from lightning_compress.training.evaluation import Measurement, batches_of, compare, evaluate, is_causal_lm
from tests.support.training_runs import Regression, Sums
from tests.support.two_ranks import run_two_ranks

V, T = 11, 6


class TinyForCausalLM(nn.Module):
    """Logits depend on the token alone."""

    def __init__(self, seed=0):
        super().__init__()
        self.table = nn.Embedding(V, V)
        with torch.no_grad():
            self.table.weight.copy_(torch.randn(V, V, generator=torch.Generator().manual_seed(seed)))

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.table(input_ids))


def run(module, batch):
    return module(batch["input_ids"])


def batches(sizes=(3, 2), **extra):
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(V, (n, T), generator=generator), **extra} for n in sizes]


def root_of(module):
    root = nn.Module()
    root.model = module
    return root


def measure(module, loader, **options):
    return evaluated(root_of(module), module, [loader], forward=run, **options)


def evaluated(root, module, loaders, limits=None, **options):
    batches = batches_of(loaders, limits or [None] * len(loaders), lambda batch, loader: batch)
    return evaluate(root, module, batches, **options)


# -- language models --------------------------------------------------------------------------------------------------


def expected_nll(module, ids):
    logp = module.table.weight.log_softmax(1)
    return torch.tensor([[-logp[a, b] for a, b in pairwise(row)] for row in ids.tolist()])


def test_perplexity_is_that_of_the_next_token():
    module, loader = TinyForCausalLM(), batches()
    found = measure(module, loader)
    nll = torch.cat([expected_nll(module, b["input_ids"]).flatten() for b in loader])
    torch.testing.assert_close(found.nll, nll)
    assert found.lengths.tolist() == [T - 1] * 5
    assert found.values["perplexity"] == pytest.approx(nll.mean().exp().item(), rel=1e-5)
    assert found.values["nll"] == pytest.approx(nll.mean().item(), rel=1e-5)
    assert found.batches == 2


def test_labels_say_which_tokens_count():
    module, (batch,) = TinyForCausalLM(), batches((2,))
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][0, :3] = -100
    found = measure(module, [batch])
    assert found.lengths.tolist() == [T - 3, T - 1]
    torch.testing.assert_close(found.nll[:3], expected_nll(module, batch["input_ids"])[0, 2:])


def test_padding_does_not_count_without_labels():
    module, (batch,) = TinyForCausalLM(), batches((2,))
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][1, 4:] = 0
    assert measure(module, [batch]).lengths.tolist() == [T - 1, 3]


def test_how_batches_are_cut_changes_nothing():
    module, (whole,) = TinyForCausalLM(), batches((5,))
    parts = [{"input_ids": ids} for ids in whole["input_ids"].split([2, 3])]
    one, two = measure(module, [whole]), measure(module, parts)
    torch.testing.assert_close(one.nll, two.nll)
    assert one.values["perplexity"] == pytest.approx(two.values["perplexity"])


def test_limits_and_progress():
    told = []
    found = measure(TinyForCausalLM(), batches((1, 1, 1)), limits=[2], progress=told.append)
    assert found.batches == 2
    assert told == [1, 2]


def test_a_broken_model_has_infinite_perplexity():
    module = TinyForCausalLM()
    with torch.no_grad():
        module.table.weight.mul_(1e4)
    assert measure(module, batches()).values["perplexity"] == math.inf
    assert 709 < measure(module, batches()).values["nll"] < math.inf


def test_which_classes_are_causal():
    assert is_causal_lm(TinyForCausalLM()) is True
    assert is_causal_lm(type("GPT2LMHeadModel", (nn.Module,), {})()) is True
    pretrained = type("PreTrainedModel", (nn.Module,), {})
    assert is_causal_lm(type("BertForMaskedLM", (pretrained,), {})()) is False
    assert is_causal_lm(nn.Linear(1, 1)) is None


def test_a_masked_language_model_is_measured_by_its_own_metric():
    pretrained = type("PreTrainedModel", (nn.Module,), {})
    module = type("BertForMaskedLM", (pretrained,), {"forward": lambda self, input_ids: None})()
    root = root_of(module)
    root.validation_step = lambda batch, index: torch.tensor(3.0)
    assert evaluated(root, module, [batches()], forward=run).values == {"loss": 3.0}


# -- the difference ---------------------------------------------------------------------------------------------------


def lm(nll, lengths):
    perplexity = math.exp(nll.mean())
    return Measurement({"perplexity": perplexity, "nll": nll.mean().item()}, nll, torch.tensor(lengths), 1)


def test_the_error_of_the_difference_is_that_of_sequences():
    """Against the standard error of a mean, which it is when all sequences are of one length."""
    generator = torch.Generator().manual_seed(0)
    before, change = torch.rand(40, 5, generator=generator), 0.1 * torch.rand(40, 5, generator=generator)
    facts = compare(lm(before.flatten(), [5] * 40), lm((before + change).flatten(), [5] * 40))
    entry = facts["metric"]["nll"]
    assert entry["difference"] == pytest.approx(change.mean().item(), rel=1e-4)
    assert entry["standard_error"] == pytest.approx(change.mean(1).std().item() / math.sqrt(40), rel=1e-4)
    assert (facts["evaluated_tokens"], facts["evaluated_sequences"]) == (200, 40)


def test_the_error_covers_the_truth():
    """Over many draws of sequences whose tokens are correlated, about 95 % of intervals hold the true mean."""
    generator, hits, draws, truth = torch.Generator().manual_seed(0), 0, 400, 0.02
    for _ in range(draws):
        own = 0.1 * torch.randn(60, 1, generator=generator)
        change = truth + own + 0.1 * torch.randn(60, 8, generator=generator)
        before = torch.rand(60 * 8, generator=generator)
        entry = compare(lm(before, [8] * 60), lm(before + change.flatten(), [8] * 60))["metric"]["nll"]
        hits += abs(entry["difference"] - truth) < 1.96 * entry["standard_error"]
    assert 0.92 < hits / draws < 0.98


def test_the_error_of_perplexity_against_the_bootstrap():
    generator = torch.Generator().manual_seed(0)
    before = 2 + torch.rand(50, 6, generator=generator)
    after = before + 0.2 * torch.rand(50, 6, generator=generator) + 0.1 * torch.randn(50, 1, generator=generator)
    found = compare(lm(before.flatten(), [6] * 50), lm(after.flatten(), [6] * 50))["metric"]["perplexity"]
    picks = torch.randint(50, (2000, 50), generator=generator)
    drawn = after[picks].mean((1, 2)).exp() - before[picks].mean((1, 2)).exp()
    assert found["standard_error"] == pytest.approx(drawn.std().item(), rel=0.1)


def test_two_ranks_measure_what_one_does(tmp_path):
    """Of a language model, and of what a validation_step logs with each reduce_fx; the second rank has fewer rows."""
    dense, pruned, loader = TinyForCausalLM(0), TinyForCausalLM(1), batches((3, 3, 1))
    logs = [3.0, 1.0, 2.0]

    def results(chosen):
        root = Regression()
        root.validation_step = lambda batch, index: [
            root.log(f"val/{how}", logs[chosen[index]], reduce_fx=how) for how in ("mean", "sum", "max", "min")
        ]
        before, after = (measure(module, [loader[i] for i in chosen]) for module in (dense, pruned))
        rows = [(loader[i]["input_ids"].float(),) for i in chosen]
        facts = compare(before, after) | {"own": own(root, [rows]).values, "values": after.values}
        return facts | {"evaluated_batches": None}

    def work(rank):
        torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
        shared, same = results([0, 2] if rank == 0 else [1]), results([0, 1, 2])
        (tmp_path / f"{rank}.json").write_text(json.dumps([shared, same]))

    assert run_two_ranks(work, tmp_path, seconds=60) == ["", ""]
    expected = results([0, 1, 2])
    for rank in (0, 1):
        shared, same = json.loads((tmp_path / f"{rank}.json").read_text())
        for name, entry in same["metric"].items():  # both ranks read the whole loader: nothing more is known
            assert entry == pytest.approx(expected["metric"][name])
        assert (same["evaluated_tokens"], same["evaluated_sequences"]) == (2 * 7 * (T - 1), 7)
        assert shared.pop("own") == pytest.approx(expected["own"])
        assert shared.pop("values") == pytest.approx(expected["values"])
        errors = {name: entry["standard_error"] for name, entry in expected["metric"].items()}
        assert {n: entry["standard_error"] for n, entry in shared["metric"].items()} == pytest.approx(errors)
        assert (shared["evaluated_tokens"], shared["evaluated_sequences"]) == (7 * (T - 1), 7)


def test_one_sequence_has_no_error():
    facts = compare(lm(torch.ones(4), [4]), lm(torch.ones(4), [4]))
    assert facts["metric"]["nll"]["standard_error"] is None
    assert facts["metric"]["nll"]["difference"] == 0


def test_nothing_measured():
    assert compare(Measurement(), Measurement())["metric"] == {}


# -- the model's own metric -------------------------------------------------------------------------------------------


class Scores(Regression):
    """Logs in the ways there are."""

    def __init__(self):
        super().__init__()
        self.mse, self.best = MeanSquaredError(), MaxMetric()
        self.many = MetricCollection({"mean": MeanMetric()})

    def validation_step(self, batch, batch_idx):
        x, y = batch
        out = self.model(x)
        self.mse(out, y)
        self.many(out)
        self.log("val/mse", self.mse, on_epoch=True, prog_bar=True)
        self.log_dict(self.many, on_epoch=True)
        self.log_dict({"val/size": float(len(x)), "val/abs": (out - y).abs().mean()}, batch_size=len(x))
        self.log("val/max", out.max(), reduce_fx="max")
        self.log("val/count", 1.0, reduce_fx="sum")


def own(module, loaders, **options):
    return evaluated(module, module.model, loaders, forward=lambda m, b: m(b[0]), **options)


def ragged():
    rows = Sums(batches=3, batch_size=4).rows
    return [tuple(t[i:j] for t in rows.tensors) for i, j in ((0, 4), (4, 8), (8, 10))]


def test_everything_that_is_logged_is_measured():
    module, loader = Scores(), ragged()
    with torch.no_grad():
        x, y = (torch.cat(part) for part in zip(*loader, strict=True))
        out = module.model(x)
    found = own(module, [loader], monitor="val/mse").values
    assert next(iter(found)) == "val/mse"
    expected = {
        "val/mse": (out - y).square().mean(), "val/abs": (out - y).abs().mean(), "val/size": (16 + 16 + 4) / 10,
        "val/max": out.max(), "val/count": 3.0, "mean": torch.stack([o.mean() for o in out.split([4, 4, 2])]),
    }  # fmt: skip
    weights = torch.tensor([4, 4, 2.0])
    expected["mean"] = (expected["mean"] * weights).sum() / 10
    assert found == {name: pytest.approx(float(value), rel=1e-5) for name, value in expected.items()}


def test_what_is_not_a_number_is_not_left_out():
    module = Regression()
    module.validation_step = lambda batch, index: module.log("val", float("nan") if index else 1.0)
    assert math.isnan(own(module, [ragged()]).values["val"])


def test_log_and_metric_states_are_given_back():
    module = Scores()
    module.best.update(torch.tensor(5.0))
    module.mse.update(torch.ones(3), torch.zeros(3))
    own(module, [ragged()])
    assert "log" not in vars(module)
    assert "log_dict" not in vars(module)
    assert module.best.compute() == 5
    assert module.mse.compute() == 1
    assert module.mse.total == 3


def test_an_error_inside_gives_log_back_too():
    module = Scores()
    module.training_mode_before = module.model.training
    module.validation_step = lambda batch, index: 1 / 0
    with pytest.raises(ZeroDivisionError):
        own(module, [ragged()])
    assert "log" not in vars(module)
    assert module.model.training


def test_modes_are_given_back_module_by_module():
    module = Scores()
    module.model[1].eval()
    own(module, [ragged()])
    assert [m.training for m in module.model] == [True, False, True]


def test_the_returned_loss_where_nothing_is_logged():
    module, loader = Regression(), ragged()
    module.validation_step = lambda batch, index: {"loss": module.error(batch)}
    with torch.no_grad():
        expected = sum(len(b[0]) * module.error(b).item() for b in loader) / 10
    assert own(module, [loader]).values == {"loss": pytest.approx(expected, rel=1e-5)}


def test_what_is_logged_at_the_end_of_the_epoch_only():
    class Late(Regression):
        def __init__(self):
            super().__init__()
            self.outputs = []

        def validation_step(self, batch, batch_idx):
            self.outputs.append(self.error(batch))
            return self.outputs[-1]

        def on_validation_epoch_end(self):
            self.log("val/mean", torch.stack(self.outputs).mean())
            self.outputs.clear()

    module = Late()
    assert list(own(module, [ragged()]).values) == ["val/mean"]
    assert module.outputs == []


def test_several_loaders_are_named_as_lightning_names_them():
    class Two(Regression):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self.log("val", float(dataloader_idx))
            self.log("all", 1.0, add_dataloader_idx=False)

    found = own(Two(), [ragged(), ragged()], limits=[1, None])
    assert found.values == {"val/dataloader_idx_0": 0.0, "val/dataloader_idx_1": 1.0, "all": 1.0}
    assert found.batches == 4


def test_an_empty_loader_measures_nothing():
    assert own(Regression(), [[]]) == Measurement()
