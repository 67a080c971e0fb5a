import _thread
import contextvars
import signal
import threading

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_compress.calibration.lockstep import LockstepThreads, run_in_lockstep


class Routed(nn.Module):
    """Each batch goes through the experts that it names, in its order."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))

    def forward(self, x, route):
        for expert in route:
            x = self.experts[expert](x)
        return x


def walk(routes, to_end=True, ready=None):
    """What happened: ("ready", module) and ("batch", number, module), in order."""
    model, happened, turn = Routed(), [], [0]
    names = {m: n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    for module, name in names.items():
        module.register_forward_hook(lambda _m, _a, _o, n=name: happened.append(("batch", turn[0], n)))
    run_in_lockstep(
        [lambda r=r: model(torch.ones(1, 2), r) for r in routes],
        names,
        ready or (lambda m: happened.append(("ready", names[m]))),
        lambda i: turn.__setitem__(0, i),
        to_end,
    )
    return happened


def test_a_module_is_finished_after_the_last_arrival_and_before_any_runs():
    assert walk([[0, 1], [0, 1]]) == [
        ("ready", "experts.0"),
        ("batch", 0, "experts.0"),
        ("batch", 1, "experts.0"),
        ("ready", "experts.1"),
        ("batch", 0, "experts.1"),
        ("batch", 1, "experts.1"),
    ]


def test_batches_may_pass_modules_by():
    happened = walk([[0, 2], [1, 2], [1], []])
    assert [h[1] for h in happened if h[0] == "ready"] == ["experts.0", "experts.1", "experts.2"]
    for name in ("experts.0", "experts.1", "experts.2"):
        ran = [i for i, h in enumerate(happened) if h[0] == "batch" and h[2] == name]
        assert min(ran) > happened.index(("ready", name))
    assert len([h for h in happened if h[0] == "batch"]) == 5


@pytest.mark.parametrize("routes", [[[0, 1], [1, 0]], [[0, 0]], [[0, 1, 0], [0, 1, 0]]])
def test_no_common_order_is_told(routes):
    with pytest.raises(ValueError, match=r"comes to 'experts.0' after it was finished: .*use walk='two_pass'"):
        walk(routes)


@pytest.mark.parametrize("batches", [1, 3])
def test_what_nobody_needs_is_not_run(batches):
    happened = walk([[0, 1, 2]] * batches, to_end=False)
    assert happened[-1] == ("ready", "experts.2")
    assert len(happened) == 3 + 2 * batches


def test_one_batch_needs_no_thread():
    threads = []
    walk([[0, 1]], ready=lambda m: threads.append(threading.active_count()))
    assert threads == [threading.active_count()] * 2


def test_modules_are_finished_on_the_callers_thread():
    threads = set()
    walk([[0, 1], [0, 1]], ready=lambda m: threads.add(threading.current_thread()))
    assert threads == {threading.current_thread()}


@pytest.mark.parametrize("batches", [1, 3])
def test_an_error_of_a_batch_comes_with_its_own_traceback(batches):
    def fail():
        raise ZeroDivisionError("in a thread")

    with pytest.raises(ZeroDivisionError, match="in a thread") as caught:
        run_in_lockstep([*[lambda: None] * (batches - 1), fail], {}, lambda m: None, lambda i: None)
    assert caught.traceback[-1].name == "fail"
    if batches > 1:
        assert caught.value.__notes__ == ["raised by calibration batch 2 (walk='one_pass')"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_threads_end_when_finishing_fails(error):
    def ready(module):
        raise error("not this one")

    with pytest.raises(error, match="not this one"):
        walk([[0, 1]] * 4, ready=ready)
    assert not [t for t in threading.enumerate() if t.name.startswith("batch ")]


def test_threads_have_the_modes_of_the_caller():
    seen = []

    def look():
        x = torch.ones(2, 2)
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_num_threads()
        seen.append((*modes, (x @ x).dtype))

    for grad, dtype in [(True, torch.float32), (False, torch.bfloat16)]:
        seen.clear()
        with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
            run_in_lockstep([look, look], {}, lambda m: None, lambda i: None)
        assert seen == [(grad, False, torch.get_num_threads(), dtype)] * 2


class Noted(TorchDispatchMode):
    def __init__(self, threads):
        super().__init__()
        self.threads = threads

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.threads.add(threading.current_thread().name)
        return func(*args, **(kwargs or {}))


def test_threads_have_the_default_device_and_the_modes_of_the_caller():
    class Sum(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return "summed" if func is torch.sum else func(*args, **(kwargs or {}))

    threads, seen = set(), []

    def look():
        seen.append((torch.empty(2).device.type, torch.sum(torch.ones(2))))

    default = torch.get_default_device()
    with torch.device("meta"), Sum(), Noted(threads), LockstepThreads() as pool:
        run_in_lockstep([look, look], {}, lambda m: None, lambda i: None, threads=pool)
        assert seen == [("meta", "summed")] * 2
        assert threads == {"batch 0", "batch 1"}
    seen.clear()
    run_in_lockstep([look, look], {}, lambda m: None, lambda i: None)
    assert seen == [("cpu", torch.tensor(2.0))] * 2
    assert torch.get_default_device() == default


def test_threads_are_used_again_for_the_next_block():
    idents, before = [], threading.active_count()

    def look():
        idents.append(threading.get_ident())

    with LockstepThreads() as pool:
        for batches in (3, 2, 4):
            run_in_lockstep([look] * batches, {}, lambda m: None, lambda i: None, threads=pool)
        assert len(idents) == 9
        assert len({*idents}) == threading.active_count() - before == 1  # no batch waits for another one
    assert threading.active_count() == before


def test_threads_are_idle_again_after_an_error():
    def ready(module):
        raise RuntimeError("not this one")

    model = Routed()
    names = {m: n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    idents, before = set(), threading.active_count()
    model.register_forward_pre_hook(lambda _m, _a: idents.add(threading.get_ident()))
    works = [lambda: model(torch.ones(1, 2), [0, 1]) for _ in range(3)]
    with LockstepThreads() as pool:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="not this one"):
                run_in_lockstep(works, names, ready, lambda i: None, threads=pool)
        assert len(idents) == 3
        assert not [t for t in threading.enumerate() if t.name.startswith("batch ")]
    assert threading.active_count() == before


@pytest.fixture
def interrupts():
    """Python's own handler of SIGINT, which is not there in a job that a shell put into the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_an_interrupt_while_a_batch_runs_ends_all_threads():
    model, names = Routed(), {}
    model.experts[1].register_forward_pre_hook(lambda _m, _a: _thread.interrupt_main())
    names.update({m: n for n, m in model.named_modules() if isinstance(m, nn.Linear)})
    works = [lambda: model(torch.ones(1, 2), [0, 1, 2]) for _ in range(3)]
    with pytest.raises(KeyboardInterrupt):
        run_in_lockstep(works, names, lambda m: None, lambda i: None)
    assert not [t for t in threading.enumerate() if t.name.startswith("batch ")]
    assert all(len(m._forward_pre_hooks) == (m is model.experts[1]) for m in names)


def test_threads_see_the_callers_context():
    variable, seen = contextvars.ContextVar("variable"), []
    variable.set("here")
    run_in_lockstep([lambda: seen.append(variable.get("gone"))] * 2, {}, lambda m: None, lambda i: None)
    assert seen == ["here", "here"]
