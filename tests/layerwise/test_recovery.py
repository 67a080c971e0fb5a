"""Recovery from pruning: what learns, from which target, how far; equal for any number of ranks and after a kill."""

from functools import partial

import pytest
import torch
from torch import nn

from lightning_compress import SparseGPTModifier, WandaPruningModifier, compress
from lightning_compress.layerwise.recovery import parents_of
from lightning_compress.team import Team
from tests.layerwise.test_owners import COLUMNS, batches
from tests.support.processes import run_processes


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.o = nn.Linear(COLUMNS, 32), nn.Linear(32, COLUMNS)

    def forward(self, x):
        return self.o(torch.tanh(self.q(x)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Mixer(), Mixer()

    def forward(self, x):
        x = x + self.first(x)
        return x + self.second(x)


class Net(nn.Module):
    def __init__(self, blocks=3):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(COLUMNS, 5)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


MAKERS = {
    "sparsegpt": partial(SparseGPTModifier, ignore="head", mask_structure="2:4"),
    "wanda": partial(WandaPruningModifier, ignore="head", sparsity=0.6),
}
RECOVERY = {"recovery_epochs": 3, "recovery_rate": 1e-2}


def pruned(maker, data, **arguments):
    model = Net()
    ledger = compress(model, MAKERS[maker](**arguments), data, walk="two_pass")
    return model, ledger


@pytest.mark.parametrize("maker", MAKERS)
def test_the_model_comes_nearer_to_the_dense_one_on_unseen_inputs_and_stays_as_sparse(maker):
    unseen, dense = torch.randn(32, 20, COLUMNS, generator=torch.Generator().manual_seed(9)), Net()
    plain, recovered = (pruned(maker, batches(12), **arguments)[0] for arguments in ({}, RECOVERY))
    with torch.no_grad():
        errors = [float((model(unseen) - dense(unseen)).square().mean()) for model in (plain, recovered)]
    assert errors[1] < 0.97 * errors[0]
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear):
            zeros = recovered.get_submodule(name).weight == 0
            assert zeros.float().mean() == (module.weight == 0).float().mean()
    biases = [(name, tensor) for name, tensor in recovered.named_parameters() if name.endswith("bias")]
    assert all(torch.equal(tensor, dense.get_parameter(name)) for name, tensor in biases)


def test_the_ledger_has_the_error_against_the_dense_model_on_the_held_out_batch():
    """Recomputed from the two models: the input of a module comes from what is recovered, the target from the dense."""
    data = batches(6)
    model, ledger = pruned("sparsegpt", data, **RECOVERY)
    rows = {row.module: row for row in ledger if row.technique == "recovery"}
    assert list(rows) == [f"blocks.{i}.{name}" for i in range(3) for name in ("first", "second")]
    outputs = {}
    for which, net in (("dense", Net()), ("now", model)):
        for name in rows:
            net.get_submodule(name).register_forward_hook(
                lambda _m, _args, output, key=(which, name): outputs.update({key: output.double()})
            )
        with torch.no_grad():
            net(data[4])
    for name, row in rows.items():
        dense, now = outputs["dense", name], outputs["now", name]
        assert row.error == pytest.approx(float((now - dense).square().sum() / dense.square().sum()), rel=1e-3)
        assert row.flags == [f"error of its output on held-out batches {began_of(row)}, recovered {row.error:.3g}"]
        assert row.error < float(began_of(row))


def began_of(row):
    return row.flags[0].split("batches ")[1].partition(",")[0]


def test_what_does_not_help_on_the_held_out_batch_is_not_kept():
    """A rate that breaks the weights leaves what was pruned, with the same input."""
    data = batches(6)
    plain, _ = pruned("sparsegpt", data)
    broken, ledger = pruned("sparsegpt", data, recovery_epochs=1, recovery_rate=100.0)
    rows = [row for row in ledger if row.technique == "recovery"]
    assert all(f"{row.error:.3g}" == began_of(row) for row in rows)
    for name, tensor in plain.named_parameters():
        torch.testing.assert_close(broken.get_parameter(name), tensor, rtol=1e-4, atol=1e-5)


def test_padding_does_not_count():
    generator = torch.Generator().manual_seed(3)
    short = [torch.randn(2, 12, COLUMNS, generator=generator) for _ in range(4)]
    noise = [torch.randn(2, 8, COLUMNS, generator=generator) * 9 for _ in range(4)]
    mask = torch.cat([torch.ones(2, 12), torch.zeros(2, 8)], 1)
    padded = [{"x": torch.cat(pair, 1), "attention_mask": mask} for pair in zip(short, noise, strict=True)]
    models = []
    for data, forward in ((short, None), (padded, lambda model, batch: model(batch["x"]))):
        model = Net()
        compress(model, MAKERS["sparsegpt"](**RECOVERY), data, forward=forward)
        models.append(model)
    for name, tensor in models[0].named_parameters():
        torch.testing.assert_close(models[1].get_parameter(name), tensor, rtol=2e-3, atol=2e-4)


def test_layers_belong_to_the_module_that_calls_them():
    model = nn.ModuleDict({"a": nn.ModuleList([nn.Linear(2, 2)]), "b": nn.Sequential(nn.Linear(2, 2), nn.ReLU())})
    outer = nn.Sequential(model, nn.Linear(2, 2))
    layers = {name: module for name, module in outer.named_modules() if isinstance(module, nn.Linear)}
    assert parents_of(outer, layers) == {"0.b": ["0.b.0"]}  # lists are not called, and the model is not a part
    inner = nn.Sequential(Block())
    layers = {name: module for name, module in inner.named_modules() if isinstance(module, nn.Linear)}
    assert parents_of(inner, layers) == {
        "0.first": ["0.first.q", "0.first.o"],
        "0.second": ["0.second.q", "0.second.o"],
    }


def test_one_batch_leaves_nothing_to_learn_from():
    with pytest.raises(ValueError, match="recovery needs at least two calibration batches, one of them held out"):
        pruned("sparsegpt", batches(1), **RECOVERY)


def test_a_rate_without_epochs_would_do_nothing():
    with pytest.raises(ValueError, match="recovery_rate without recovery_epochs would do nothing; give such as 2"):
        SparseGPTModifier(recovery_rate=1e-2)


def outcome(_, count):
    model, team = Net(), Team.of_processes()
    ledger = compress(model, MAKERS["sparsegpt"](**RECOVERY), batches(count), team=team)
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in ledger.state_dict()]
    return {name: tensor.tolist() for name, tensor in model.state_dict().items()}, rows


def test_any_number_of_ranks_gives_the_bits_of_one(tmp_path):
    work = partial(outcome, count=5)
    [alone] = run_processes(work, tmp_path / "1", 1)
    assert run_processes(work, tmp_path / "2", 2) == [alone] * 2


def test_a_run_that_is_killed_goes_on_with_equal_bits(tmp_path):
    data, log = batches(4), tmp_path / "log"

    class Killed(BaseException):
        pass

    def stop(text, finished, total):
        if finished == 2:
            raise Killed

    whole, _ = pruned("sparsegpt", data, **RECOVERY)
    model = Net()
    with pytest.raises(Killed):
        compress(model, MAKERS["sparsegpt"](**RECOVERY), data, log=log, progress=stop)
    again = Net()
    compress(again, MAKERS["sparsegpt"](**RECOVERY), data, log=log)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
