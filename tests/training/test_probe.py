"""A probe measures what rounding would cost, and leaves no trace in the run."""

import signal

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from lightning_compress import QuantizationProbe
from tests.support.training_runs import Regression, Sums, quiet
from tests.support.two_ranks import run_two_ranks


class Noisy(Regression):
    """Everything that a probe could disturb: dropout, BatchNorm, a list of outputs, a counting buffer."""

    def __init__(self) -> None:
        super().__init__(torch.optim.Adam)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 1))
        self.outputs: list[torch.Tensor] = []
        self.register_buffer("steps", torch.zeros(1))
        self.lengths: list[int] = []

    def validation_step(self, batch, batch_idx):
        self.steps += 1
        self.outputs.append(self.error(batch) + 0 * torch.rand(1))
        self.log("val/mse", self.outputs[-1])

    def on_validation_epoch_end(self):
        self.lengths.append(len(self.outputs))
        self.outputs.clear()

    def training_step(self, batch, batch_idx):
        return self.error(batch) * (1 + 0 * self.steps.sum()) + torch.rand(1).sum()


def end_of(folder, module, *callbacks, **options):
    torch.manual_seed(0)
    trainer = quiet(folder, *callbacks, max_epochs=3, enable_checkpointing=False, **options)
    with torch.random.fork_rng():
        trainer.fit(module, Sums())
        return [*module.state_dict().values(), torch.get_rng_state()], trainer


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_training_goes_on_bit_for_bit_as_without_it(tmp_path, precision):
    modules = []
    for _ in range(2):
        torch.manual_seed(1)
        modules.append(Noisy())
    plain, _ = end_of(tmp_path, modules[0], precision=precision)
    probed, trainer = end_of(tmp_path, modules[1], QuantizationProbe(batches=2), precision=precision)
    assert all(torch.equal(a, b) for a, b in zip(plain, probed, strict=True))
    assert modules[1].lengths == modules[0].lengths
    assert modules[1].outputs == []
    assert trainer.callback_metrics["probe/W3A16/val/mse_increase"] != 0


def rounded(W, bits):
    """To nearest, one scale per row: s = max|w| / (2^bits - 1) * 2."""
    scale = W.abs().amax(1, keepdim=True) / ((2**bits - 1) / 2)
    return (W / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale


def test_it_logs_the_change_of_the_metric_and_the_noise_of_the_weights(tmp_path):
    torch.manual_seed(0)
    module, data, logger = Regression(), Sums(), CSVLogger(tmp_path)
    trainer = quiet(tmp_path, QuantizationProbe(["W4A16", "W2A16"], batches=3), logger=logger)
    trainer.fit(module, data)
    scalars = trainer.callback_metrics
    x, y = data.rows[:12]
    loss = nn.functional.mse_loss
    dense = {n: p.detach().clone() for n, p in module.named_parameters()}
    for bits in (4, 2):
        noise = []
        with torch.no_grad():
            before = loss(module(x), y)
            for linear in (module.model[0], module.model[2]):
                W = linear.weight.clone()
                linear.weight.copy_(rounded(W, bits))
                noise.append(10 * (W.square().sum() / (W - linear.weight).square().sum()).log10().item())
            after = loss(module(x), y)
            module.load_state_dict(dense)
        prefix = f"probe/W{bits}A16"
        assert scalars[f"{prefix}/val/mse_increase"].item() == pytest.approx((after - before).item(), rel=1e-4)
        assert scalars[f"{prefix}/sqnr_db"].item() == pytest.approx(sum(noise) / 2, rel=1e-4)
        assert scalars[f"{prefix}/sqnr_db_lowest"].item() == pytest.approx(min(noise), rel=1e-4)
    text = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    assert "probe/W4A16/val/mse_increase" in text
    assert "sqnr_db/" not in text


class Fails(Regression):
    """Validates once without a fault, then ends as told in the middle of the probe's batches for rounded weights."""

    def __init__(self, end) -> None:
        super().__init__()
        self.calls, self.end = 0, end

    def validation_step(self, batch, batch_idx):
        self.calls += 1
        if self.calls == 4 + 2 + 2:  # validation, dense, rounded
            self.rounded = [m.weight.clone() for m in self.model if isinstance(m, nn.Linear)]
            self.end()
        super().validation_step(batch, batch_idx)


def fail() -> None:
    raise RuntimeError("in the middle")


@pytest.mark.parametrize("end", [fail, lambda: signal.raise_signal(signal.SIGUSR1)], ids=["error", "signal"])
def test_weights_are_back_whatever_ends_it(tmp_path, end):
    weights = {}

    class Watch(QuantizationProbe):
        def on_validation_end(self, trainer, pl_module):
            weights.update({n: p.detach().clone() for n, p in pl_module.named_parameters()})
            super().on_validation_end(trainer, pl_module)

    def leave(number, frame):
        raise SystemExit(3)

    module, former = Fails(end), signal.signal(signal.SIGUSR1, leave)
    try:
        with pytest.raises((RuntimeError, SystemExit)):
            quiet(tmp_path, Watch("W3A16", batches=2), num_sanity_val_steps=0).fit(module, Sums())
    finally:
        signal.signal(signal.SIGUSR1, former)
    assert not torch.equal(module.rounded[0], weights["model.0.weight"])
    assert all(torch.equal(p, weights[n]) for n, p in module.named_parameters())
    assert "log" not in vars(module)


def test_it_counts_validations_without_the_sanity_check(tmp_path):
    steps = []

    class Watch(QuantizationProbe):
        def _probe(self, trainer, *args):
            steps.append(trainer.global_step)
            return super()._probe(trainer, *args)

    probe = Watch(every_n_validations=2, batches=1)
    trainer = quiet(tmp_path, probe, max_epochs=2, val_check_interval=2, num_sanity_val_steps=2)
    trainer.fit(Regression(), Sums())
    assert steps == [2, 6]
    trainer.validate(Regression(), Sums(), verbose=False)
    assert probe.state_dict() == {"validations": 4}
    resumed = QuantizationProbe()
    resumed.load_state_dict(probe.state_dict())
    assert resumed.state_dict() == {"validations": 4}


def test_where_validation_measures_nothing_each_module_has_its_noise(tmp_path):
    class Silent(Regression):
        def validation_step(self, batch, batch_idx):
            self(batch[0])

    trainer = quiet(tmp_path, QuantizationProbe("W4A16"))
    trainer.fit(Silent(), Sums())
    names = [name for name in trainer.callback_metrics if name.startswith("probe/")]
    assert names == [f"probe/W4A16/{name}" for name in ("sqnr_db", "sqnr_db_lowest", "sqnr_db/0", "sqnr_db/2")]


def test_a_compiled_model_is_measured_rounded(tmp_path):
    torch.manual_seed(0)
    module = Regression()
    module.model = torch.compile(module.model, backend="eager")
    trainer = quiet(tmp_path, QuantizationProbe("W2A16"))
    trainer.fit(module, Sums())
    assert trainer.callback_metrics["probe/W2A16/val/mse_increase"] != 0


def test_weights_that_no_module_is_called_for_count(tmp_path):
    """An LSTM multiplies its parameters itself."""

    class Recurrent(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.LSTM(8, 16, batch_first=True)

        def forward(self, x):
            return self.model(x[:, None])[0].mean(-1)

    module = Recurrent()
    trainer = quiet(tmp_path, QuantizationProbe("W2A16", targets="LSTM"))
    trainer.fit(module, Sums())
    assert trainer.callback_metrics["probe/W2A16/val/mse_increase"] != 0
    assert not list(module.model.children())


def test_ranks_agree(tmp_path):
    def work(rank):
        torch.manual_seed(0)
        trainer = quiet(tmp_path, QuantizationProbe("W3A16", batches=1), strategy="ddp", devices=2)
        module = Regression()
        trainer.fit(module, Sums())
        scalars = {n: v for n, v in trainer.callback_metrics.items() if n.startswith("probe/")}
        torch.save([scalars, module.state_dict()], tmp_path / f"rank{rank}.pt")

    assert run_two_ranks(work, tmp_path, 60) == ["", ""]
    (zero, weights), (one, others) = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert zero == one
    assert zero["probe/W3A16/val/mse_increase"] != 0
    assert all(torch.equal(weights[n], others[n]) for n in weights)


def test_weights_that_became_nan_do_not_end_training(tmp_path):
    class Diverges(Regression):
        def on_validation_start(self):
            if not self.trainer.sanity_checking:
                with torch.no_grad():
                    self.model[0].weight[0, 0] = torch.nan

    trainer = quiet(tmp_path, QuantizationProbe("W4A16"))
    with pytest.warns(UserWarning, match="this validation is not probed: .*NaN"):
        trainer.fit(Diverges(), Sums())
    assert trainer.global_step == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schemes": []}, "schemes is empty, expected names of presets"),
        ({"schemes": ["W5A8x"]}, "unknown scheme 'W5A8x'"),
        ({"schemes": "W8A8"}, "'W8A8' quantizes inputs, too, which a probe does not; take .*W8A16"),
        ({"scale_search": "hessian"}, "scale_search='hessian': expected 'minmax' or 'mse'"),
        ({"batches": 0}, "batches=0: expected at least 1"),
        ({"every_n_validations": 1.5}, "every_n_validations=1.5 is a float"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        QuantizationProbe(**arguments)


def test_targets_that_match_nothing_are_refused_before_training(tmp_path):
    module = Regression()
    with pytest.raises(ValueError, match="Conv2d"):
        quiet(tmp_path, QuantizationProbe(targets="Conv2d")).fit(module, DataLoader(Sums().rows))
    assert module.model[0].weight.grad is None
