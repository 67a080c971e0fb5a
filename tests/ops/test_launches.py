"""The device of a launch; tables of launches: look-up, validation, writing; the tables of the package are valid."""

import json
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from lightning_compress.ops.hessian import launch as hessian
from lightning_compress.ops.launches import LaunchTable, launching
from lightning_compress.ops.w4a16_gemm import launch as w4a16
from tests.support.fake_cuda import fake_cuda


@dataclass(frozen=True)
class Launch:
    block: int
    fast: bool


def entry(M, N=64, block=16, fast=True, **more):
    return {"at": {"M": M, "N": N}, "launch": {"block": block, "fast": fast}, **more}


@pytest.fixture
def table(tmp_path):
    (tmp_path / "launch.json").write_text("{}")
    return LaunchTable(tmp_path / "launch.json", Launch, exact=("N",), at_most="M")


def test_the_smallest_bound_that_is_large_enough_holds(table):
    table.write("A100", [entry(64, block=64), entry(1, block=1), entry(16, block=16), entry(16, N=128, block=128)])
    launches = {M: table.find("A100", {"M": M, "N": 64}) for M in (1, 2, 16, 17, 64, 65)}
    blocks = {M: launch and launch.block for M, launch in launches.items()}
    assert blocks == {1: 1, 2: 16, 16: 16, 17: 64, 64: 64, 65: None}
    assert table.find("A100", {"M": 3, "N": 128}) == Launch(128, True)
    assert table.find("A100", {"M": 3, "N": 32}) is None
    assert table.find("H100", {"M": 3, "N": 64}) is None


def test_writing_replaces_entries_of_the_same_shape_alone(table):
    table.write("A100", [entry(1, block=1, us=2.5, rule_us=3.0, triton="3.6.0"), entry(2, block=2)])
    table.write("H100", [entry(1, block=9)])
    assert table.find("A100", {"M": 1, "N": 64}) == Launch(1, True)
    table.write("A100", [entry(1, block=7)])
    assert table.read() == {"A100": [entry(1, block=7), entry(2, block=2)], "H100": [entry(1, block=9)]}
    assert table.find("A100", {"M": 1, "N": 64}) == Launch(7, True)  # not what was read before
    assert table.path.read_text().count("\n") == 9  # a line for each entry


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"at": {"M": 1, "N": 64}}, 'expected "at" and "launch"'),
        (entry(1, speed=3), "unknown keys: speed"),
        (entry(1) | {"at": {"M": 1}}, 'expected the sizes N, M in "at"'),
        (entry(1) | {"launch": {"block": 16}}, 'expected the fields block, fast in "launch"'),
        (entry(1, block="16"), "block must be int, got '16'"),
        (entry(1, block=True), "block must be int, got True"),
        (entry(1, fast=1), "fast must be bool, got 1"),
        (entry(1, block=0), "block must be at least 1, got 0"),
        (entry(0), "M must be an integer of at least 1"),
    ],
)
def test_what_is_no_entry_is_refused(table, row, message):
    with pytest.raises(ValueError, match=message):
        table.write("A100", [row])
    assert table.read() == {}
    table.path.write_text(json.dumps({"A100": [row]}))
    with pytest.raises(ValueError, match=rf"launch.json of .*, A100, entry .*: .*{message}; remove it"):
        table.find("A100", {"M": 1, "N": 64})


def test_a_shape_that_comes_twice_and_a_file_that_is_no_table_are_refused(table):
    table.path.write_text(json.dumps({"A100": [entry(1), entry(1, block=2)]}))
    with pytest.raises(ValueError, match="this shape is listed twice"):
        table.read()
    table.path.write_text("[]")
    with pytest.raises(ValueError, match=r"expected {GPU: \[entries\]}"):
        table.read()


@pytest.mark.parametrize("op", [w4a16, hessian], ids=lambda op: op.__name__.split(".")[-2])
def test_shipped_tables_are_sound(op):
    assert isinstance(op.TABLE.read(), dict)


@pytest.fixture
def h200(monkeypatch):
    properties = SimpleNamespace(name="H200", multi_processor_count=132, major=9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return torch.device("cuda")


def test_the_table_goes_before_the_rule(monkeypatch, tmp_path, h200):
    bf16 = torch.bfloat16
    by_rule = w4a16.rule(16, 4096, 4096, bf16, 132)
    assert w4a16.choose(16, 4096, 4096, bf16, h200) == by_rule
    assert hessian.choose(16384, 4096, bf16, h200, True) == hessian.rule(16384, 4096, 132, True)
    assert not hessian.choose(16384, 4096, bf16, h200, False).descriptors
    path = tmp_path / "launch.json"
    path.write_text("{}")
    for op, at, launch in (
        (w4a16, w4a16.shape(32, 4096, 4096, bf16, 128), w4a16.W4Launch(32, 128, 2, 8, 5, True)),
        (hessian, hessian.shape(16384, 4096, bf16, True), hessian.HessianLaunch(128, 128, 32, 1, 1, 4, 2, False)),
    ):
        path.write_text("{}")
        table = LaunchTable(path, op.TABLE.launch, op.TABLE.exact, op.TABLE.at_most)
        monkeypatch.setattr(op, "TABLE", table)
        table.write("H200", [{"at": at, "launch": vars(launch)}])
        if op is w4a16:
            assert op.choose(16, 4096, 4096, bf16, h200) == launch
            assert op.choose(16, 4096, 4096, bf16, h200, group=64) == by_rule
            assert op.choose(16, 4096, 4096, torch.float32, h200) == w4a16.rule(16, 4096, 4096, torch.float32, 132)
        else:
            assert op.choose(2048, 4096, bf16, h200, True) == launch
            assert op.choose(2048, 4096, bf16, h200, False) == op.rule(2048, 4096, 132, False)


@pytest.mark.parametrize(("M", "N", "K"), [(1, 4096, 4096), (64, 28672, 8192), (500, 100, 96)])
def test_candidates_begin_with_the_rule_and_none_comes_twice(M, N, K):
    launches = list(w4a16.candidates(M, N, K, torch.bfloat16, 132))
    assert launches[0] == w4a16.rule(M, N, K, torch.bfloat16, 132)
    assert len(set(launches)) == len(launches) > 30
    assert all(launch.split == 1 or launch.split * 4 <= -(-K // 128) for launch in launches[1:])


@pytest.mark.parametrize("descriptors", [True, False])
def test_candidates_of_the_hessian_fill_the_last_wave_in_pieces(descriptors):
    launches = list(hessian.candidates(2048, 1024, 132, descriptors))
    assert launches[0] == hessian.rule(2048, 1024, 132, descriptors)
    assert len(set(launches)) == len(launches) > 20
    assert descriptors or not any(launch.descriptors for launch in launches)
    assert {launch.pieces for launch in launches} > {1}


class Kernel:
    """Notes the current device of its launches in place of a compiled kernel."""

    def __init__(self, fault=None):
        self.devices, self.fault = [], fault

    def __getitem__(self, grid):
        def launch(*_, **__):
            self.devices.append(torch.cuda.current_device())
            if self.fault is not None:
                raise self.fault

        return launch


def test_a_kernel_is_launched_on_the_device_of_its_arguments(monkeypatch):
    kernel = pytest.importorskip("lightning_compress.ops.mask_2of4.kernel", reason="Triton: make test-kernels")
    monkeypatch.setattr(kernel, "mask_kernel", recorder := Kernel())
    with fake_cuda():
        for device in ("cuda:1", "cuda:0"):
            kernel.mask_2of4(torch.ones(2, 4, dtype=torch.float32, device=device))
            assert torch.cuda.current_device() == 0
    assert recorder.devices == [1, 0]


def test_a_failed_launch_leaves_the_current_device_as_it_was():
    with fake_cuda() as gpu:
        x = torch.ones(4, dtype=torch.float32, device="cuda:1")
        devices = []
        with pytest.raises(IndexError), launching(x):
            devices.append(gpu.current) or devices[1]
        assert (devices, gpu.current) == ([1], 0)


def test_a_kernel_that_is_first_launched_inside_a_graph_says_what_to_do(monkeypatch):
    with fake_cuda():
        x = torch.ones(4, dtype=torch.float32, device="cuda:0")
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        message = r"is captured \(no module\).*run the model once"
        with pytest.raises(RuntimeError, match=message) as caught, launching(x):
            raise OSError("no module")
        assert isinstance(caught.value.__cause__, OSError)
        with pytest.raises(KeyboardInterrupt), launching(x):
            raise KeyboardInterrupt
