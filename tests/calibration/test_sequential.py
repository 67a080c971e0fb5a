import copy
import threading

import pytest
import torch
from torch import nn

from lightning_compress.calibration import calibrate
from lightning_compress.calibration.options import CalibrationOptions
from lightning_compress.core import Event
from tests.support.calibration_models import (
    Biased,
    C,
    Dense,
    EncoderDecoder,
    Layered,
    LockstepWatcher,
    Stages,
    Watcher,
    inputs_of,
    make_batches,
    plain,
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


def test_the_clock_of_the_caller_is_on_every_event():
    class Clocked(Watcher):
        def on_event(self, state, event, **kwargs):
            self.finished.append(f"{event.global_step}")

    watcher = Clocked(change=False)
    calibrate(*started(watcher, model=seeded(Layered, 2)), make_batches(1, 2, 5, C), clock=Event(global_step=7))
    assert {"7"} == {f for f in watcher.finished if f.isdigit()}


# -- bad input --------------------------------------------------------------------------------------------------------


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
