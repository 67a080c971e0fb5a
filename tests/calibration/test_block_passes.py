"""Stages of a recipe over one group: who sees what, in which order, and which hooks act."""

import pytest
import torch
from pydantic import PrivateAttr

from lightning_compress.calibration import calibrate
from lightning_compress.calibration.options import CalibrationOptions
from lightning_compress.core import Modifier, Needs
from tests.support.calibration_models import (
    C,
    Layered,
    LockstepWatcher,
    OwnPassWatcher,
    Watcher,
    inputs_of,
    make_batches,
    plain,
    seeded,
    started,
)


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
