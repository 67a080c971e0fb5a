import copy
import logging
import threading
import weakref

import pytest
import torch
from pydantic import PrivateAttr
from torch import nn

from lightning_compress.calibration import calibrate
from lightning_compress.calibration.options import CalibrationOptions
from lightning_compress.core import Event, Modifier, Needs
from tests.support.calibration_models import (
    Biased,
    C,
    Dense,
    EncoderDecoder,
    Layered,
    LockstepWatcher,
    Mixer,
    OwnPassWatcher,
    Stages,
    Watcher,
    inputs_of,
    make_batches,
    seeded,
    started,
)

CASES = {
    "layered": (Layered, make_batches(3, 2, 5, C), None),
    "cnn": (Stages, make_batches(3, 2, 3, 9, 9), None),
    "encoder-decoder": (EncoderDecoder, make_batches(3, 2, 5, C), lambda model, x: model(x, x[:, :2])),
    "bias handed on": (Biased, make_batches(3, 2, 5, C), None),
    "head reads all": (Dense, make_batches(3, 2, 5, C), None),
}


def plain(forward, batches):
    return [lambda model, x=x: (forward or (lambda m, y: m(y)))(model, x) for x in batches]


@pytest.mark.parametrize("case", CASES)
def test_one_pass_gives_every_target_the_input_that_the_finished_model_gives_it(case):
    model_class, batches, forward = CASES[case]
    model, watcher = seeded(model_class), LockstepWatcher()
    calibrate(*started(watcher, model=model), batches, forward=forward, options=CalibrationOptions(walk="one_pass"))
    model.eval()
    wanted = inputs_of(model, list(watcher.inputs), plain(forward, batches))
    for name, inputs in watcher.inputs.items():
        assert len(inputs) == len(batches)  # once per batch
        for got, expected in zip(inputs, wanted[name], strict=True):
            assert torch.equal(got, expected), name
    targets = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    reached = [n for n in targets if n not in ("blocks.1.bias", "blocks.2.bias")]  # those are never called
    assert sorted(watcher.inputs) == sorted(reached)


@pytest.mark.parametrize("case", CASES)
def test_two_passes_give_a_block_the_inputs_that_the_compressed_blocks_before_it_give(case):
    model_class, batches, forward = CASES[case]
    model, watcher = seeded(model_class), Watcher()
    dense = copy.deepcopy(model).eval()
    calibrate(*started(watcher, model=model), batches, forward=forward, options=CalibrationOptions(walk="two_pass"))
    model.eval()
    done = [where for event, where in watcher.events if event == "BLOCK_END"]
    compressed = dict(model.named_modules())
    for block in [w for w in done if w]:
        names = [n for n in watcher.inputs if n.startswith(f"{block}.")]
        before = watcher.finished[: min(watcher.finished.index(n) for n in names)]
        reference = copy.deepcopy(dense)
        for name in before:
            reference.get_submodule(name).weight.data = compressed[name].weight.data.clone()
        wanted = inputs_of(reference, names, plain(forward, batches))
        for name in names:
            for got, expected in zip(watcher.inputs[name], wanted[name], strict=True):
                assert torch.equal(got, expected), name


@pytest.mark.parametrize("case", CASES)
def test_walks_agree_where_nothing_is_changed(case):
    model_class, batches, forward = CASES[case]
    seen = []
    for walk, watcher_class in [("one_pass", LockstepWatcher), ("two_pass", Watcher), ("whole", Watcher)]:
        watcher = watcher_class(change=False)
        calibrate(
            *started(watcher, model=seeded(model_class)),
            batches,
            forward=forward,
            options=CalibrationOptions(walk=walk),
        )
        seen.append(watcher.inputs)
    for other in seen[1:]:
        assert other.keys() == seen[0].keys()
        for name in other:
            assert all(torch.equal(a, b) for a, b in zip(other[name], seen[0][name], strict=True)), name


def test_order_of_events():
    watcher = LockstepWatcher(targets=["embed", "head", "re:.*[.](q|out)$", "re:layers.1[.]"])
    calibrate(*started(watcher, model=seeded(Layered, 2)), make_batches(2, 2, 5, C))
    assert watcher.events == [
        ("CALIBRATION_START", ""),
        ("MODULE_READY", "embed"),
        ("BLOCK_END", ""),
        *[("MODULE_READY", f"layers.0.{n}") for n in ("k,layers.0.v", "q", "out")],  # nobody waits for k and v
        ("BLOCK_END", "layers.0"),
        *[("MODULE_READY", f"layers.1.{n}") for n in ("q", "k", "v", "out")],
        ("BLOCK_END", "layers.1"),
        ("MODULE_READY", "norm"),
        ("MODULE_READY", "head"),
        ("BLOCK_END", ""),
        ("CALIBRATION_END", ""),
    ]


def test_the_clock_of_the_caller_is_on_every_event():
    class Clocked(Watcher):
        def on_event(self, state, event, **kwargs):
            self.finished.append(f"{event.global_step}")

    watcher = Clocked(change=False)
    calibrate(*started(watcher, model=seeded(Layered, 2)), make_batches(1, 2, 5, C), clock=Event(global_step=7))
    assert {"7"} == {f for f in watcher.finished if f.isdigit()}


def test_modules_with_one_input_see_one_tensor_object():
    watcher = LockstepWatcher(targets=["layers.1.q", "layers.1.k", "layers.1.v"])
    calibrate(*started(watcher, model=seeded(Layered)), make_batches(3, 2, 5, C))
    by_name = {n: [x for name, x in watcher.objects if name == n] for n in watcher.inputs}
    for q, k, v in zip(*by_name.values(), strict=True):
        assert q is k is v


def test_auto_takes_one_pass_where_it_can_and_two_where_a_modifier_needs_the_block():
    def events(*modifiers):
        calibrate(*started(*modifiers, model=seeded(Layered)), make_batches(2, 2, 5, C))
        return [event for event, _ in modifiers[-1].events]

    assert "MODULE_READY" in events(LockstepWatcher())
    assert "MODULE_READY" not in events(Watcher())
    assert "MODULE_READY" not in events(LockstepWatcher(targets=["layers.0.q"]), Watcher())


@pytest.mark.parametrize("walk", ["one_pass", "two_pass"])
def test_weights_that_need_no_data_are_rounded_before_the_batches_meet_them(walk):
    """Two modifiers: one looks at the outputs, the other rounds q, k and v without looking."""

    class WithoutData(LockstepWatcher):
        needs = Needs(calibration=True, one_pass=True)

        def on_calibration_start(self, state, event, **kwargs):
            self._names.update({m: n for n, m in state.model.named_modules() if n.endswith((".q", ".k", ".v"))})

    model, rounding, watcher = seeded(Layered), WithoutData(), LockstepWatcher(targets=["re:layers.*out$"])
    calibrate(
        *started(watcher, rounding, model=model),
        (batches := make_batches(2, 2, 5, C)),
        options=CalibrationOptions(walk=walk),
    )
    assert len(rounding.finished) == 9
    wanted = inputs_of(model.eval(), list(watcher.inputs), plain(None, batches))
    same = [torch.equal(a, b) for n in wanted for a, b in zip(watcher.inputs[n], wanted[n], strict=True)]
    assert all(same) == (walk == "one_pass")  # else a block is finished after all have looked


def test_hooks_that_are_there_for_training_stay_quiet():
    class Trainer(Modifier):
        _called: bool = PrivateAttr(default=False)

        def on_initialize(self, state, **kwargs):
            for module in (state.model, state.model.layers[1], state.model.head):
                self.hook(module, lambda module, args, output: setattr(self, "_called", True), "forward")
            return True

    trainer, watcher = Trainer(), LockstepWatcher(targets=["Mixer", "Linear"], change=False)
    calibrate(*started(trainer, watcher, model=seeded(Layered)), make_batches(2, 2, 5, C))
    assert not trainer._called
    assert trainer._paused == 0
    assert len(trainer.hooked) == 3
    assert len(watcher.inputs["layers.1"]) == 2  # blocks may be targets, too


def test_own_pass_shows_later_modifiers_the_block_as_it_leaves_it():
    model = seeded(Layered)
    first, second = OwnPassWatcher(targets=["layers.0.v"]), LockstepWatcher(targets=["layers.0.out"])
    calibrate(*started(first, second, model=model), (batches := make_batches(3, 2, 5, C)))
    assert ("MODULE_READY", "layers.0.out") in second.events  # the last stage may go in lockstep
    assert "MODULE_READY" not in [e for e, _ in first.events]
    wanted = inputs_of(model.eval(), ["layers.0.out"], plain(None, batches))["layers.0.out"]
    assert all(torch.equal(a, b) for a, b in zip(second.inputs["layers.0.out"], wanted, strict=True))
    assert len(first.inputs["layers.0.v"]) == 3  # and no hook twice


@pytest.mark.parametrize("walk", ["one_pass", "two_pass"])
def test_inputs_of_one_block_are_alive_not_of_all(walk):
    alive, most = weakref.WeakSet(), []

    class Counting(nn.Module):
        """A block whose outputs are watched."""

        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(C, C)

        def forward(self, x):
            y = torch.tanh(self.lin(x))
            alive.add(y)
            most.append(len(alive))
            return y

    class Blind(LockstepWatcher):
        def see(self, module, args):
            """Keep nothing."""

    model = nn.Sequential(*[Counting() for _ in range(6)])
    watcher = Blind(change=False)
    calibrate(*started(watcher, model=model), make_batches(4, 2, 5, C), options=CalibrationOptions(walk=walk))
    assert max(most) <= 4 + 2  # one per batch, and those on their way


def test_peculiar_batches_reach_the_walk_of_their_own_arguments():
    """Batches of different shapes, of which only some have a mask to share."""
    batches = [*make_batches(1, 2, 5, C), *make_batches(1, 1, 7, C), *make_batches(2, 3, 4, C)]
    model, watcher = seeded(Layered), LockstepWatcher()
    calibrate(*started(watcher, model=model), batches)
    wanted = inputs_of(model.eval(), list(watcher.inputs), plain(None, batches))
    assert all(torch.equal(a, b) for n in wanted for a, b in zip(watcher.inputs[n], wanted[n], strict=True))


def test_a_batch_that_goes_another_way_splits_the_segment(caplog):
    class Odd(Layered):
        def forward(self, x):
            x = self.embed(x)
            for layer in self.layers:
                x = layer(x + 0 if len(x) == 3 else x, mask=torch.ones_like(x))
            return self.head(x)

    batches = [*make_batches(2, 2, 5, C), *make_batches(1, 3, 5, C)]
    model, watcher = seeded(Odd), LockstepWatcher()
    with caplog.at_level(logging.INFO, logger="lightning_compress"):
        calibrate(*started(watcher, model=model), batches)
    assert "run one by one: batch 2" in caplog.text
    wanted = inputs_of(model.eval(), list(watcher.inputs), plain(None, batches))
    assert all(torch.equal(a, b) for n in wanted for a, b in zip(watcher.inputs[n], wanted[n], strict=True))


def test_slower_ways_are_told(caplog):
    with caplog.at_level(logging.INFO, logger="lightning_compress"):
        calibrate(*started(Watcher(), model=seeded(Biased)), make_batches(2, 2, 5, C))
    assert "arguments of 'blocks.1' are computed from outputs of blocks" in caplog.text
    assert "running the model from its start" in caplog.text


@pytest.mark.parametrize("walk", ["auto", "two_pass"])
def test_a_model_without_blocks_is_walked_as_a_whole(walk, caplog):
    model, watcher = nn.Sequential(nn.Linear(C, C), nn.Tanh(), nn.Linear(C, 3)), LockstepWatcher()
    with caplog.at_level(logging.INFO, logger="lightning_compress"):
        calibrate(
            *started(watcher, model=model), (batches := make_batches(2, 4, C)), options=CalibrationOptions(walk=walk)
        )
    assert "found no repeated blocks in Sequential: it is walked as a whole" in caplog.text
    assert watcher.events[-2] == ("BLOCK_END", "")
    assert watcher.finished == ["0", "2"]
    if walk == "auto":  # in lockstep: the second one sees the first one rounded
        wanted = inputs_of(model, ["2"], plain(None, batches))["2"]
        assert all(torch.equal(a, b) for a, b in zip(watcher.inputs["2"], wanted, strict=True))


def test_shared_blocks_make_it_a_whole_walk():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Mixer(), Mixer()])

        def forward(self, x):
            for layer in [*self.layers, *self.layers]:
                x = layer(x, torch.ones_like(x))
            return x

    watcher = Watcher()
    with pytest.warns(UserWarning, match=r"'layers.0' runs 2 times per forward pass"):
        calibrate(*started(watcher, model=seeded(Recurrent)), make_batches(2, 2, 5, C))
    assert len(watcher.inputs["layers.1.q"]) == 4
    impossible = pytest.raises(ValueError, match=r"walk='one_pass' is not possible: 'layers.0.q' runs 2 times")
    with pytest.warns(UserWarning, match="runs 2 times"), impossible:
        calibrate(
            *started(LockstepWatcher(), model=seeded(Recurrent)),
            make_batches(2, 2, 5, C),
            options=CalibrationOptions(walk="one_pass"),
        )


def test_blocks_that_are_not_called_are_named_and_told_their_end():
    class Skipping(Layered):
        def forward(self, x):
            return self.head(self.layers[2](self.layers[0](self.embed(x), torch.ones_like(x)), torch.ones_like(x)))

    watcher = Watcher()
    blocks = pytest.warns(UserWarning, match=r"does not reach the blocks \['layers.1'\]")
    targets = pytest.warns(UserWarning, match=r"does not reach the targets \['layers.1.q', .*'layers.1.out'\]")
    with blocks, targets:
        calibrate(*started(watcher, model=seeded(Skipping)), make_batches(2, 2, 5, C))
    assert ("BLOCK_END", "layers.1") in watcher.events


def test_multihead_attention_is_named():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(C, 2, 16, batch_first=True), 2, enable_nested_tensor=False)
    watcher = LockstepWatcher()
    with pytest.warns(UserWarning, match=r"\['layers.0.self_attn.out_proj', .*'\]: nn.MultiheadAttention uses"):
        calibrate(*started(watcher, model=model), make_batches(2, 2, 5, C))
    assert sorted(watcher.inputs) == [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]  # not fused


def test_token_mask_reaches_the_hooks_of_its_batch():
    keep = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    x = make_batches(3, 2, 5, C)
    batches = [
        {"x": x[0], "attention_mask": keep},
        {"x": x[1], "attention_mask": torch.ones(2, 5)},
        {"x": x[2], "attention_mask": keep.flip(0)},
    ]
    for watcher in (LockstepWatcher(targets=["layers.1.out"]), Watcher(targets=["layers.1.out"])):
        lifecycle, state = started(watcher, model=seeded(Layered))
        calibrate(lifecycle, state, batches)
        assert [None if m is None else m.tolist() for m in watcher.masks] == [
            keep.bool().tolist(),
            None,
            keep.flip(0).bool().tolist(),
        ]
        assert watcher.token_mask is None


def test_hooks_of_a_finished_input_act_on_batches_that_wait():
    """A modifier may quantize a module's input from then on: waiting batches go through that, too."""

    class InputRounder(LockstepWatcher):
        def on_module_ready(self, state, event, **kwargs):
            super().on_module_ready(state, event, **kwargs)
            for module in state.modules.values():
                module.register_forward_pre_hook(lambda _m, args: ((args[0] * 4).round() / 4, *args[1:]))

    model, watcher, batches = seeded(Layered, 2), InputRounder(), make_batches(3, 2, 5, C)
    calibrate(*started(watcher, model=model), batches, options=CalibrationOptions(walk="one_pass"))
    names = [n for n in watcher.inputs if n.startswith("layers.1")]
    seen = {n: [] for n in names}
    for n in names:  # before the rounding hooks, as the watcher
        model.get_submodule(n).register_forward_pre_hook(lambda _m, a, n=n: seen[n].append(a[0]), prepend=True)
    with torch.no_grad():
        for x in batches:
            model.eval()(x)
    assert all(torch.equal(a, b) for n in names for a, b in zip(watcher.inputs[n], seen[n], strict=True))


# -- progress ---------------------------------------------------------------------------------------------------------


def test_progress_goes_up_to_its_total():
    told = []
    batches = make_batches(2, 2, 5, C)
    calibrate(*started(LockstepWatcher(), model=seeded(Layered)), batches, progress=lambda *a: told.append(a))
    assert told[0][0].startswith("probe")
    assert told[-1] == ("done", 4, 4)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert ("layers.1: layers.1.k, batch 2/2", 1, 4) in told


# -- bad input --------------------------------------------------------------------------------------------------------


def test_walk_is_checked():
    with pytest.raises(ValueError, match="walk='twice': expected 'auto', 'one_pass'"):
        calibrate(
            *started(Watcher(), model=seeded(Layered)),
            make_batches(1, 2, 5, C),
            options=CalibrationOptions(walk="twice"),
        )
    with pytest.raises(ValueError, match="Watcher finishes whole blocks, not single modules; use walk='two_pass'"):
        calibrate(
            *started(Watcher(), model=seeded(Layered)),
            make_batches(1, 2, 5, C),
            options=CalibrationOptions(walk="one_pass"),
        )


def test_blocks_of_a_whole():
    with pytest.raises(ValueError, match=r"walk='whole' takes the model as one block, so blocks='Mixer' has no effect"):
        calibrate(
            *started(Watcher(), model=seeded(Layered)),
            make_batches(1, 2, 5, C),
            options=CalibrationOptions(blocks="Mixer", walk="whole"),
        )


def test_no_batches():
    lifecycle, state = started(Watcher(), model=seeded(Layered))
    with pytest.raises(ValueError, match=r"Watcher needs calibration data and there are no batches; pass batches="):
        calibrate(lifecycle, state, None)
    with pytest.raises(ValueError, match="batches is empty"):
        calibrate(lifecycle, state, [])
    assert [e for e, _ in lifecycle.modifiers[0].events] == []  # told before anything began


def test_blocks_that_match_nothing():
    with pytest.raises(ValueError, match=r"blocks=\['Lyer'\] matches none"):
        calibrate(
            *started(Watcher(), model=seeded(Layered)),
            make_batches(1, 2, 5, C),
            options=CalibrationOptions(blocks="Lyer"),
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value):
    model = seeded(Layered)
    model.layers[1].k.weight.data[0, 0] = value
    with pytest.raises(ValueError, match=r"NaN or Inf in the weights \['layers.1.k.weight'\]"):
        calibrate(*started(Watcher(), model=model), make_batches(1, 2, 5, C))


@pytest.mark.parametrize("walk", ["one_pass", "two_pass", "whole"])
@pytest.mark.parametrize("at", [0, 2])
def test_a_batch_that_is_not_finite_is_named(walk, at):
    batches = make_batches(3, 2, 5, C)
    batches[at][1, 2, 3] = float("nan")
    watcher = LockstepWatcher()
    lifecycle, state = started(watcher, model=seeded(Layered))
    with pytest.raises(ValueError, match=rf"NaN in .*'.*' for calibration batch {at}, expected finite numbers"):
        calibrate(lifecycle, state, batches, options=CalibrationOptions(walk=walk))
    assert watcher.hooked == []


@pytest.mark.parametrize("walk", ["one_pass", "two_pass"])
def test_the_module_that_makes_it_is_named(walk):
    """Every batch but the last is fine, and the last one overflows inside a block, behind its last target."""

    class Overflowing(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.pow = nn.Linear(C, C), Power()

        def forward(self, x):
            return self.pow(self.lin(x))

    class Power(nn.Module):
        def forward(self, x):
            return torch.exp(x)

    model = nn.Sequential(*[Overflowing() for _ in range(2)])
    batches = make_batches(2, 2, C)
    batches[1] *= 1e4
    with pytest.raises(ValueError, match=r"Inf in the output of block '0' \(first out of module '0.pow'\) .* batch 1"):
        calibrate(*started(LockstepWatcher(), model=model), batches, options=CalibrationOptions(walk=walk))


def test_padding_may_be_anything():
    batches = make_batches(2, 2, 5, C)
    batches[1][0, 4] = float("nan")
    mask = torch.ones(2, 5)
    mask[0, 4] = 0
    calibrate(*started(LockstepWatcher(), model=seeded(Layered)), [{"x": x, "attention_mask": mask} for x in batches])


# -- what must not change ---------------------------------------------------------------------------------------------


def everything(model):
    """What a calibration must leave alone."""
    return (
        {n: (m.training, list(m._forward_pre_hooks), list(m._forward_hooks)) for n, m in model.named_modules()},
        {n: sorted(m.__dict__) for n, m in model.named_modules()},
        {n: (p.requires_grad, p.grad) for n, p in model.named_parameters()},
        torch.get_rng_state().tolist(),
        torch.is_grad_enabled(),
        torch.backends.mha.get_fastpath_enabled(),
    )


@pytest.mark.parametrize("walk", ["one_pass", "two_pass", "whole"])
@pytest.mark.parametrize("fails", [None, "forward", "finish", "interrupt"])
def test_nothing_is_left_behind(walk, fails):
    class Failing(LockstepWatcher):
        def finish(self, state):
            if fails in ("finish", "interrupt") and "layers.1.k" in state.modules:
                raise KeyboardInterrupt if fails == "interrupt" else RuntimeError("no such rounding")
            super().finish(state)

    model = seeded(Layered).train()
    model.layers[1].eval()
    model.layers[0].q.weight.requires_grad_(False)
    if fails == "forward":
        model.layers[1].v.forward = explode_after(2)
    before, watcher = everything(model), Failing()
    lifecycle, state = started(watcher, model=model)
    if fails is None:
        calibrate(lifecycle, state, make_batches(3, 2, 5, C), options=CalibrationOptions(walk=walk))
    else:
        with pytest.raises(BaseException, match=r"no such rounding|out of order|^$") as caught:
            calibrate(lifecycle, state, make_batches(3, 2, 5, C), options=CalibrationOptions(walk=walk))
        assert type(caught.value) is (KeyboardInterrupt if fails == "interrupt" else RuntimeError)
        if fails == "forward":  # with the traceback of the thread it was raised in
            assert caught.traceback[-1].name == "explode"
    assert everything(model) == before
    assert watcher.hooked == []
    assert watcher._paused == 0
    assert not [t for t in threading.enumerate() if t.name.startswith("batch ")]


def test_weights_written_under_inference_mode_can_be_trained():
    model, watcher = seeded(Layered), LockstepWatcher()
    with torch.inference_mode():
        calibrate(*started(watcher, model=model), make_batches(2, 2, 5, C))
    assert len(watcher.inputs["head"]) == 2
    assert not any(p.is_inference() for p in model.parameters())
    model(make_batches(1, 2, 5, C)[0]).sum().backward()
    assert model.head.weight.grad is not None


def explode_after(calls):
    """A forward that works for a while."""
    count, weight = iter(range(100)), torch.eye(C)

    def explode(x):
        if next(count) >= calls:
            raise RuntimeError("out of order")
        return x @ weight

    return explode


# -- the probe takes a small sample -----------------------------------------------------------------------------------


def test_what_a_small_sample_does_not_reach_is_looked_for_in_the_whole_batch():
    class Routed(Layered):
        def forward(self, x):
            x = self.embed(x)
            for layer in self.layers[: 1 + len(x)]:  # the third one runs for two rows only
                x = layer(x, torch.ones_like(x))
            return self.head(x)

    watcher = LockstepWatcher()
    calibrate(*started(watcher, model=seeded(Routed)), make_batches(2, 2, 5, C))
    assert len(watcher.inputs["layers.2.q"]) == 2


def test_a_model_that_wants_whole_batches_gets_them():
    class Pairs(Layered):
        def forward(self, x):
            left, right = x.chunk(2)
            return super().forward(left) * super().forward(right)

    watcher = Watcher()
    with pytest.warns(UserWarning, match=r"'layers.0' runs 2 times"):
        calibrate(*started(watcher, model=seeded(Pairs)), make_batches(2, 2, 5, C))
    assert len(watcher.inputs["layers.2.q"]) == 4


def test_batches_that_call_blocks_differently_are_told():
    class Shallow(Layered):
        def forward(self, x):
            x = self.embed(x)
            for layer in self.layers[: 4 - len(x)]:  # the last one does not run for two rows
                x = layer(x, torch.ones_like(x))
            return self.head(x)

    batches = [*make_batches(1, 1, 5, C), *make_batches(1, 2, 5, C)]
    message = r"batch 1 does not run .* as the first one did: block 'layers.2' was not called; use walk='whole'"
    with pytest.raises(ValueError, match=message):
        calibrate(*started(Watcher(), model=seeded(Shallow)), batches)
    watcher = Watcher()
    calibrate(*started(watcher, model=seeded(Shallow)), batches, options=CalibrationOptions(walk="whole"))
    assert len(watcher.inputs["layers.2.q"]) == 1
