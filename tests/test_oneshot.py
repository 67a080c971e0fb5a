from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_compress import GPTQModifier, QuantizationModifier, load, save
from lightning_compress.core import Ledger, Modifier, Needs
from lightning_compress.oneshot import compress
from tests.support.calibration_models import C, Layered, LockstepWatcher, Watcher, make_batches, seeded


class WeightRounder(Modifier):
    """Needs no data."""

    needs = Needs(calibration=True)

    def on_initialize(self, state, **kwargs):
        return True

    def on_block_end(self, state, event, **kwargs):
        for name, module in state.modules.items():
            if isinstance(module, nn.Linear):
                module.weight.data = module.weight.data.round()
                state.ledger.add(name, "rounded")


def test_a_model_is_compressed_in_place_and_the_ledger_comes_back():
    model, modifier = seeded(Layered).train(), WeightRounder()
    ledger = compress(model, modifier)
    assert isinstance(ledger, Ledger)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert sorted(row.module for row in ledger) == sorted(names)  # embed and head outside of blocks, too
    assert len(ledger) == len(names)
    assert all(torch.equal(p, p.round()) for n, p in model.named_parameters() if "norm" not in n and "weight" in n)
    assert modifier.finalized
    assert model.training


def test_a_recipe_without_data_runs_no_forward():
    class Unrunnable(Layered):
        def forward(self, x):
            raise AssertionError("the model was run")

    compress(seeded(Unrunnable), WeightRounder())
    compress(seeded(Unrunnable), WeightRounder(), make_batches(2, 2, 5, C))


@pytest.mark.parametrize("given", [list, tuple, lambda m: {str(i): x for i, x in enumerate(m)}])
def test_modifiers_come_one_or_many_in_order(given):
    told = []

    class Telling(Watcher):
        def on_calibration_end(self, state, event, **kwargs):
            told.append(self.group)

    compress(seeded(Layered), given([Telling(group="a"), Telling(group="b")]), make_batches(1, 2, 5, C))
    assert told == ["a", "b"]


def test_batches_of_a_loader_are_taken_up_to_the_maximum():
    watcher = LockstepWatcher()
    loader = DataLoader(torch.randn(10, 5, C), batch_size=2)
    compress(seeded(Layered), watcher, loader, max_batches=3)
    assert len(watcher.inputs["head"]) == 3


def test_tuples_and_a_forward_of_the_users():
    x = make_batches(2, 2, 5, C)
    seen = []
    for batches, forward in [
        (x, None),
        ([(b, torch.zeros(2)) for b in x], None),
        ([{"x": b, "labels": b, "unknown": b} for b in x], None),
        ([{"pixels": b} for b in x], lambda model, batch: model(batch["pixels"])),
    ]:
        watcher = LockstepWatcher()
        compress(seeded(Layered), watcher, batches, forward=forward)
        seen.append(watcher.inputs)
    for other in seen[1:]:
        assert all(torch.equal(a, b) for n in seen[0] for a, b in zip(seen[0][n], other[n], strict=True))


def test_a_seed_gives_the_same_result_and_leaves_the_random_state_alone():
    class Noisy(LockstepWatcher):
        def finish(self, state):
            for module in state.modules.values():
                if module in self._names:
                    module.weight.data = torch.randn(module.weight.shape)

    results = []
    for seed in (0, 0, 1):
        model, before = seeded(Layered), torch.get_rng_state()
        compress(model, Noisy(), make_batches(2, 2, 5, C), seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        results.append(model.head.weight)
        torch.rand(1)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


# -- bad input --------------------------------------------------------------------------------------------------------


def test_no_batches():
    with pytest.raises(ValueError, match="Watcher needs calibration data and there are no batches"):
        compress(seeded(Layered), Watcher())
    with pytest.raises(ValueError, match="batches yields nothing, expected at least one calibration batch; check"):
        compress(seeded(Layered), Watcher(), [])
    used_up = iter([])
    with pytest.raises(ValueError, match="batches yields nothing"):
        compress(seeded(Layered), Watcher(), used_up)


@pytest.mark.parametrize(
    ("batches", "kind"), [(torch.zeros(2, 5, C), "Tensor"), ({"x": torch.zeros(2, 5, C)}, "dict"), ("batches", "str")]
)
def test_one_batch_is_no_list_of_batches(batches, kind):
    with pytest.raises(ValueError, match=rf"batches is one {kind}, expected an iterable of batches; pass \[batch\]"):
        compress(seeded(Layered), Watcher(), batches)


def test_fewer_batches_than_asked_for():
    with pytest.warns(UserWarning, match="max_batches=5, but there are only 2"):
        compress(seeded(Layered), Watcher(), make_batches(2, 2, 5, C), max_batches=5)
    with pytest.raises(ValueError, match="max_batches=0, expected at least 1"):
        compress(seeded(Layered), Watcher(), make_batches(2, 2, 5, C), max_batches=0)


def test_keys_that_the_model_does_not_know():
    with pytest.raises(ValueError, match=r"Layered.forward takes none of the batch's keys \['labels', 'pixels'\]"):
        compress(seeded(Layered), Watcher(), [{"pixels": torch.zeros(1), "labels": torch.zeros(1)}])


def test_it_is_no_model_and_no_modifier():
    with pytest.raises(ValueError, match=r"model is a str, expected an nn.Module"):
        compress("model", Watcher())
    with pytest.raises(ValueError, match="expected a Modifier"):
        compress(seeded(Layered), ["gptq"])


def test_a_modifier_class_and_a_recipe_by_name(tmp_path):
    model, data = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)), [torch.randn(4, 8)]
    with pytest.raises(ValueError, match=r"got the class GPTQModifier: write GPTQModifier\(\.\.\.\)"):
        compress(model, GPTQModifier, data)
    entry = "{_target_: lightning_compress.QuantizationModifier, scheme: W8A16, group_size: -1}"
    (tmp_path / "mine.yaml").write_text(f"modifiers:\n  rtn: {entry}\n")
    assert [row.module for row in compress(model, str(tmp_path / "mine.yaml"), data)] == ["0", "1"]
    (tmp_path / "more.yaml").write_text((tmp_path / "mine.yaml").read_text() + "walk: whole\n")
    with pytest.raises(ValueError, match=r"sets \{'walk': 'whole'\} for CompressionCallback: give compress\(\)"):
        compress(model, str(tmp_path / "more.yaml"), data)
    with pytest.raises(ValueError, match="gptq_w5"):
        compress(model, "gptq_w5", data)


def test_one_bare_layer_is_refused_and_in_a_sequential_compressed(tmp_path):
    linear, data = nn.Linear(8, 4), [torch.randn(4, 8)]
    modifier = partial(QuantizationModifier, scheme="W8A16", group_size=-1)
    with pytest.raises(ValueError, match=r"is a Linear without modules inside.*compress nn.Sequential\(model\)"):
        compress(linear, modifier(), data)
    dense = linear.weight.clone()
    compress(nn.Sequential(linear), modifier(), data)
    assert not torch.equal(linear.weight, dense)


def test_data_parallel_is_compressed_and_saved_as_the_model_inside(tmp_path):
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)), [torch.randn(4, 8)]
    wrapped = nn.DataParallel(model)
    ledger = compress(wrapped, QuantizationModifier(scheme="W8A16", group_size=-1), data)
    assert [row.module for row in ledger] == ["0", "1"]
    save(wrapped, tmp_path / "out")
    loaded = load(tmp_path / "out", nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)))
    assert torch.equal(loaded(data[0]), model(data[0]))


def test_hooks_come_off_when_it_fails():
    class Failing(Watcher):
        def on_finalize(self, state, **kwargs):
            raise RuntimeError("no")

        def on_calibration_end(self, state, event, **kwargs):
            """Leave the hooks on."""

    watcher = Failing()
    with pytest.raises(RuntimeError, match="no"):
        compress(seeded(Layered), watcher, make_batches(1, 2, 5, C))
    assert watcher.hooked == []
