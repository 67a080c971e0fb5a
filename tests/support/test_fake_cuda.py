"""The pretended device computes real values, refuses what a GPU refuses, and counts what a GPU pays for."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tests.support.fake_cuda import FakeCudaTensor, fake_cuda

X = torch.arange(12, dtype=torch.float32).view(3, 4)


def test_values_are_real_and_the_device_is_cuda():
    with fake_cuda():
        x = X.to("cuda:1")
        y = (x @ x.t() + torch.ones(3, dtype=torch.float32, device=x.device))[1:, :2]
        assert y.device == torch.device("cuda", 1)
        assert y.is_cuda
        assert not x.cpu().is_cuda
        assert torch.zeros(2, dtype=torch.float32, device="cuda").device == torch.device("cuda", 0)
        with torch.cuda.device(1):
            assert torch.tensor([1], device="cuda").device == torch.device("cuda", 1)
        assert_close(y.cpu(), (X @ X.t() + 1)[1:, :2])


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x + X,
        lambda x: X.addmm_(X[:, :3], x),
        lambda x: torch.cat([x, X]),
        lambda x: x + x.to("cuda:1"),
        lambda x: X[torch.tensor([0], device="cuda:0")],
        lambda x: x[torch.tensor([0], device="cuda:1")],
        lambda x: nn.Linear(4, 2).to("cuda:1")(x),
    ],
)
def test_devices_must_not_meet(mix):
    with fake_cuda(), pytest.raises(RuntimeError, match="Expected all tensors to be on the same device.* cuda:[01]"):
        mix(X.to("cuda:0"))


def test_a_number_on_the_cpu_goes_with_any_device():
    with fake_cuda():
        assert_close((X.to("cuda:0") + torch.tensor(1.0)).cpu(), X + 1)


COSTS = {  # launches, syncs, pageable copies
    "one op": (lambda x: x + 1, (1, 0, 0)),
    "in place": (lambda x: x.mul_(2), (1, 0, 0)),
    "a view": (lambda x: x.t()[1:].view(3, 3).unsqueeze(0).detach(), (0, 0, 0)),
    "memory": (lambda x: torch.empty_like(x).new_empty(3), (0, 0, 0)),
    "item": (lambda x: float(x[0, 0]), (0, 1, 0)),
    "a condition": (lambda x: bool((x > 0).all()), (2, 1, 0)),
    "tolist": (lambda x: x.tolist(), (0, 1, 0)),
    "a boolean index": (lambda x: x[x > 0], (1, 1, 0)),
    "a boolean index for a number": (lambda x: x.__setitem__(x > 0, 1.0), (2, 0, 0)),
    "nonzero": (lambda x: x.nonzero(), (0, 1, 0)),
    "to the host": (lambda x: x.cpu(), (0, 1, 0)),
    "to the host, not waiting": (lambda x: x.to("cpu", non_blocking=True), (0, 0, 0)),
    "to the device": (lambda x: X.to(x.device), (0, 0, 1)),
    "into the device": (lambda x: x.copy_(X), (0, 0, 1)),
    "an index on the host": (lambda x: x[torch.tensor([0, 2])], (1, 0, 1)),
    "an index on the device": (lambda x: x[torch.arange(2, device=x.device)], (2, 0, 0)),
    "numbers": (lambda x: torch.tensor([1, 2], device=x.device), (0, 0, 1)),
    "without data": (lambda x: x.to("meta"), (0, 0, 0)),
    "synchronize": (lambda x: torch.cuda.synchronize(), (0, 1, 0)),
}


@pytest.mark.parametrize("name", COSTS)
def test_what_a_gpu_pays_for_is_counted(name):
    work, costs = COSTS[name]
    with fake_cuda() as gpu:
        x = X.to("cuda:0")
        gpu.reset()
        work(x)
        assert (gpu.launches.total(), gpu.syncs.total(), gpu.pageable.total()) == costs


def test_costs_are_counted_by_line_of_the_package():
    from lightning_compress.ops.hessian import mirror_

    with fake_cuda() as gpu:
        mirror_(torch.ones(4, 4, dtype=torch.float32, device="cuda:0"))
        assert {line.partition(":")[0] for line in gpu.launches} - {"outside the package"} == {
            "ops/hessian/__init__.py"
        }


def test_modules_move_and_their_parameters_are_replaced_as_on_a_gpu():
    with fake_cuda():
        linear = nn.Linear(4, 2).to("cuda:0")
        other = copy.deepcopy(linear)
        for module in (linear, other):
            assert isinstance(module.weight, nn.Parameter)
            assert isinstance(module.weight, FakeCudaTensor)
        linear.weight.data = torch.ones_like(other.weight)
        linear.bias.data.zero_()
        assert_close(linear(X.to("cuda:0")).cpu(), X.sum(1, keepdim=True).expand(3, 2))
        assert linear(X.to("cuda:0")).requires_grad
        assert type(linear.to("cpu").weight) is nn.Parameter
    assert torch.__future__.get_overwrite_module_params_on_conversion() is False


@pytest.mark.parametrize("wait", [lambda x: torch.cuda.synchronize(), lambda x: x.cpu(), lambda x: float(x[0, 0])])
def test_a_copy_to_the_host_must_not_be_read_before_the_host_waited(wait):
    with fake_cuda() as gpu:
        x = X.to("cuda:0")
        gpu.reset()
        copied = x.to("cpu", non_blocking=True)
        assert_close((copied.view(-1).to("cuda:0") + 1).cpu(), X.view(-1) + 1)  # read by the device, in order
        copied = x.to("cpu", non_blocking=True)
        with pytest.raises(RuntimeError, match="read before it has arrived"):
            copied.view(-1) + 1
        wait(x)
        assert_close(copied, X)
        assert gpu.pageable.total() == 0


def test_an_event_waits_for_the_copies_before_it():
    with fake_cuda() as gpu:
        x, event = X.to("cuda:0"), torch.cuda.Event()
        before = x.to("cpu", non_blocking=True)
        event.record()
        after = x.to("cpu", non_blocking=True)
        event.synchronize()
        event.synchronize()  # nothing to wait for
        assert gpu.syncs.total() == 1
        assert_close(before, X)
        with pytest.raises(RuntimeError, match="read before it has arrived"):
            after.sum()


def test_memory_is_counted_once_for_all_views_and_given_back():
    with fake_cuda() as gpu:
        x = torch.zeros(1000, dtype=torch.float32, device="cuda:0")
        view = x.view(10, 100)[1:]
        y = view + 1
        assert gpu.live == 4000 + y.nbytes
        del y
        x.data = torch.zeros(10, dtype=torch.float32, device="cuda:0")
        assert gpu.live == 4000 + 40
        del view
        assert (gpu.live, gpu.peak) == (40, 4000 + 3600)
        del x
        assert gpu.live == 0
