"""CUDA devices that do not exist, for tests on machines without a GPU.

    with fake_cuda() as gpu:
        model.to("cuda:0")
        compress(model, modifier, [tokens.to("cuda:0")])
    assert gpu.syncs.total() <= 12

Inside :func:`fake_cuda`, tensors on ``cuda:0`` and ``cuda:1`` are wrappers around tensors in CPU memory
(:class:`FakeCudaTensor`): they report the device, and every op computes real values on the CPU. What a GPU would refuse
is refused: an op whose tensors are on different devices raises torch's own error. What a GPU would pay for is counted
by the file and line of the package that asked for it:

- ``launches``: ops that write a result on the device. An op of ``torch.ops.lightning_compress`` is one, as its kernel
  is one (its CPU implementation computes); views, ``empty`` and reads of a shape are none.
- ``syncs``: the host waits for the device: ``item``, ``bool``, ``tolist``, ``nonzero``, a boolean index, ``equal``, a
  copy to the CPU without ``non_blocking``.
- ``pageable``: copies to the device from CPU memory that is not pinned (they wait, too), indices among them.

``live`` are the bytes of the device's tensors, and ``peak`` the most there were. A copy to the host that nobody waited
for has not arrived: reading it raises, until the host waits for the device, or for an event that was recorded later.

How: ``Tensor._make_wrapper_subclass`` gives a tensor of device ``cuda`` whose ops arrive at ``__torch_dispatch__``; a
dispatch mode sees the calls that make one out of a device's name. Bindings of torch (``x[i]``, ``copy_``) and autograd
need a device guard, which a CPU build lacks: :func:`install_guard` installs torch's own no-op guard.

Not possible: ``backward``. The forward pass records its graph, but the engine asks for the current stream of CUDA
(``at::accelerator::getCurrentStream``) for every gradient on a device of this type, and those hooks are compiled into
a CUDA build alone. A backend registered from Python (``PrivateUse1``) does not help: the engine takes its streams from
the one accelerator of the process, and asserts that it is of the type of the gradients (tried with torch 2.13).
Streams are not imitated either: all work is on one.
"""

import ctypes
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["FakeCudaTensor", "FakeGpu", "fake_cuda", "install_guard"]

PACKAGE = str(Path(__file__).parents[2] / "lightning_compress")
WAITS = {  # ops whose result has a size, or a value, that the host must know
    "_local_scalar_dense", "_unique2", "bincount", "equal", "is_nonzero", "masked_select", "nonzero",
    "unique_consecutive", "unique_dim",
}  # fmt: skip
NO_LAUNCH = WAITS | {"_unsafe_view", "empty", "empty_like", "empty_strided", "lift_fresh", "new_empty", "set_"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


class FakeGpu:
    """What the device was asked for, by ``file:line`` of the package.

    Attributes:
        current: Number of the current device.
        live: Bytes of memory that tensors of the device hold.
        peak: The most there were since the last reset.
    """

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()
        self.pageable: Counter[str] = Counter()
        self.current = 0
        self.pinned: set[int] = set()  # addresses
        self.live = self.peak = 0
        self._holders: Counter[int] = Counter()  # tensors by the address of their memory
        self._coming: list[tuple[Tensor, torch.device]] = []  # copies to the host that may not have arrived

    def reset(self) -> None:
        """Count from zero again; what is live stays so."""
        for counter in (self.launches, self.syncs, self.pageable):
            counter.clear()
        self.peak = self.live

    def hold(self, tensor: "FakeCudaTensor") -> Callable[[], Any]:
        """Count the memory of a tensor; the result gives it back, and does so when the tensor is dropped."""
        storage = tensor.value.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        self.live += size * (not self._holders[address])
        self.peak = max(self.peak, self.live)
        self._holders[address] += 1

        def give_back() -> None:
            self._holders[address] -= 1
            self.live -= size * (not self._holders[address])

        return weakref.finalize(tensor, give_back)

    def wait(self) -> None:
        """The host waits for the device: all copies have arrived."""
        self.syncs[_line()] += 1
        self._coming.clear()

    def send(self, copy: Tensor, source: torch.device) -> None:
        """A copy to the host was begun, into memory that torch pins."""
        self._coming.append((copy, source))
        self.pinned.add(copy.data_ptr())

    @property
    def copies_are_coming(self) -> bool:
        return bool(self._coming)

    def check_arrived(self, name: str, tensors: Sequence[Tensor], reader: torch.device) -> None:
        """RuntimeError where one of these is a copy that may not have arrived; its device itself works in order."""
        coming = {copy.untyped_storage().data_ptr() for copy, source in self._coming if source != reader}
        if coming and any(t.untyped_storage().data_ptr() in coming for t in tensors if t.device.type == "cpu"):
            raise RuntimeError(f"a copy from the device is read before it has arrived ({name} at {_line()})")


class FakeCudaTensor(Tensor):
    """A tensor on a device that does not exist; ``value`` holds its numbers on the CPU."""

    value: Tensor
    gpu: FakeGpu

    @staticmethod
    def __new__(cls, value: Tensor, device: torch.device, gpu: FakeGpu) -> "FakeCudaTensor":
        return Tensor._make_wrapper_subclass(
            cls, value.size(), strides=value.stride(), storage_offset=value.storage_offset(), dtype=value.dtype,
            layout=value.layout, device=device,
        )  # fmt: skip

    def __init__(self, value: Tensor, device: torch.device, gpu: FakeGpu):
        self.value, self.gpu = value, gpu
        self._memory = gpu.hold(self)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        gpu = next(t.gpu for t in _tensors((args, kwargs)) if isinstance(t, FakeCudaTensor))
        return _run(gpu, op, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:
        return f"FakeCudaTensor({self.value!r}, device={str(self.device)!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> "FakeCudaTensor":
        copied = FakeCudaTensor(self.value.clone(), self.device, self.gpu).requires_grad_(self.requires_grad)
        copied.__dict__.update({k: v for k, v in self.__dict__.items() if k not in ("value", "gpu", "_memory")})
        return memo.setdefault(id(self), copied)

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, new: "FakeCudaTensor") -> None:
        Tensor.data.__set__(self, new)
        self._memory()
        self.value = new.value
        self._memory = self.gpu.hold(self)

    def new_tensor(self, data: Any, dtype: torch.dtype | None = None, device: Any = None, **options: Any) -> Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or self.device, **options)

    def tolist(self) -> Any:
        self.gpu.wait()
        return self.value.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy")

    def data_ptr(self) -> int:
        return self.value.data_ptr()

    def untyped_storage(self) -> Any:
        return self.value.untyped_storage()


@contextmanager
def fake_cuda(devices: int = 2) -> Iterator[FakeGpu]:
    """Two CUDA devices (or another number) of compute capability 9.0 exist inside, and count what they do.

    A module moved to one (``module.to("cuda:0")``) gets new parameters, as CPU memory cannot become a fake in place.
    """
    install_guard()
    gpu = FakeGpu()
    properties = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=2**37)

    class Current:
        """torch.cuda.device"""

        def __init__(self, device: Any):
            self.index = torch.device("cuda", device).index if isinstance(device, int) else torch.device(device).index

        def __enter__(self) -> None:
            self.before, gpu.current = gpu.current, gpu.current if self.index is None else self.index

        def __exit__(self, *_: Any) -> None:
            gpu.current = self.before

    class Event:
        """torch.cuda.Event"""

        def record(self, *_: Any) -> None:
            self.copies = list(gpu._coming)

        def synchronize(self) -> None:
            before = {id(copy) for copy, _ in self.copies}
            later = [(copy, source) for copy, source in gpu._coming if id(copy) not in before]
            if len(later) < len(gpu._coming):
                gpu.wait()
                gpu._coming += later

    in_torch_cuda: Mapping[str, Any] = {
        "_lazy_init": lambda: None, "current_device": lambda: gpu.current, "device": Current, "Event": Event,
        "device_count": lambda: devices, "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: properties.name, "get_device_properties": lambda *_: properties,
        "is_available": lambda: True, "is_current_stream_capturing": lambda: False, "is_initialized": lambda: False,
        "synchronize": lambda *_: gpu.wait(),
    }  # fmt: skip
    with ExitStack() as stack:
        for name, value in in_torch_cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        for name in ("tensor", "as_tensor"):
            stack.enter_context(mock.patch.object(torch, name, _from_numbers(getattr(torch, name))))
        stack.enter_context(_eager_compressed_tensors())
        stack.callback(
            torch.__future__.set_overwrite_module_params_on_conversion,
            torch.__future__.get_overwrite_module_params_on_conversion(),
        )
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.enter_context(_Mode(gpu))
        yield gpu


@cache
def install_guard() -> None:
    """Give a CPU build of torch the no-op device guard of CUDA; a build for CUDA keeps its own.

    ``torch._C._ensureCUDADeviceGuardSet`` puts it where a registered guard reports no device. A CPU build has none
    registered, so one whose every method returns 0 is, for the moment of this call.
    """
    core = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 2).in_dll(core, "_ZN3c104impl26device_guard_impl_registryE")  # of CPU and CUDA
    if guards[1] is None:
        nothing = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0)
        methods = (ctypes.c_void_p * 64)(*[ctypes.cast(nothing, ctypes.c_void_p)] * 64)
        guard = ctypes.c_void_p(ctypes.addressof(methods))
        guards[1] = ctypes.addressof(guard)
        torch._C._ensureCUDADeviceGuardSet()
        assert guards[1] != ctypes.addressof(guard)


class _Mode(TorchDispatchMode):
    """Sees calls without a fake tensor among their arguments, such as ``torch.zeros(3, device="cuda")``."""

    def __init__(self, gpu: FakeGpu):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(self.gpu, op, args, kwargs or {})


def _run(gpu: FakeGpu, op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Compute an op on the values of its tensors, and count what it costs."""
    name, tensors = _name(op), list(_tensors((args, kwargs)))
    fakes = [t for t in tensors if isinstance(t, FakeCudaTensor)]
    if gpu.copies_are_coming and not op.is_view and name not in NO_LAUNCH:
        gpu.check_arrived(name, tensors, _reader(gpu, name, tensors, kwargs))
    if not fakes and kwargs.get("device") is None:
        return op(*args, **kwargs)
    _check_devices(name, tensors)
    named = kwargs.get("device")
    device = torch.device(named) if named is not None else (tensors[0] if name == "copy_" else fakes[0]).device
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", gpu.current)
    _count(gpu, op, name, args, kwargs, device)
    options = {k: v for k, v in kwargs.items() if k != "pin_memory"}
    if device.type == "cuda" and named is not None:
        options["device"] = "cpu"
    values = _mapped((args, options), lambda t: t.value if isinstance(t, FakeCudaTensor) else t)
    if name == "histc":  # of integers only on CUDA
        result = op(values[0][0].float(), *values[0][1:], **values[1]).to(values[0][0].dtype)
    else:
        result = op(*values[0], **values[1])
    if name in ("_to_copy", "_pin_memory") and isinstance(result, Tensor) and result is values[0][0]:
        result = result.clone()
    if fakes and device.type == "cpu" and _is_not_waited_for(name, args, kwargs):
        gpu.send(result, fakes[0].device)
    wrappers = {id(t.value): t for t in fakes}

    def wrapped(value: Tensor) -> Tensor:
        if (same := wrappers.get(id(value))) is not None:
            return same
        return FakeCudaTensor(value, device, gpu) if device.type == "cuda" else value

    return _mapped(result, wrapped)


def _reader(gpu: FakeGpu, name: str, tensors: Sequence[Tensor], kwargs: Mapping[str, Any]) -> torch.device:
    """The device that reads the CPU tensors of an op: copies to a device are its own work."""
    if name == "_to_copy" and kwargs.get("device") is not None:
        device = torch.device(kwargs["device"])
        return torch.device("cuda", gpu.current) if device.type == "cuda" and device.index is None else device
    return tensors[0].device if name == "copy_" else torch.device("cpu")


def _is_not_waited_for(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a copy is asked for with ``non_blocking``."""
    return bool(kwargs.get("non_blocking")) or (name == "copy_" and len(args) > 2 and bool(args[2]))


@cache
def _name(op: Any) -> str:
    return op._schema.name.removeprefix("aten::")


def _tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors among arguments; torch's pytree takes three times as long."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, list | tuple):
        for item in tree:
            yield from _tensors(item)
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))


def _mapped(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same structure with a function of each tensor."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, list | tuple):
        items = [_mapped(item, function) for item in tree]
        return items if isinstance(tree, list) else tuple(items)
    return {k: _mapped(v, function) for k, v in tree.items()} if isinstance(tree, dict) else tree


def _check_devices(name: str, tensors: Sequence[Tensor]) -> None:
    """Torch's error where tensors are on different devices; numbers on the CPU go with any, and some ops copy."""
    devices = {t.device for t in tensors if t.dim() or t.device.type == "cuda"}
    if name in INDEXING and tensors[0].device.type == "cuda":
        devices.discard(torch.device("cpu"))  # an index is copied
    if len(devices) > 1 and name not in ("_to_copy", "copy_"):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, "
            f"{' and '.join(sorted(map(str, devices)))}! ({name} at {_line()})"
        )


def _count(
    gpu: FakeGpu, op: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], device: torch.device
) -> None:
    source = args[1] if name == "copy_" else args[0] if args else None
    moved = name in ("_to_copy", "copy_") and source.device.type != device.type
    values = args[2] if name in INDEXING and len(args) > 2 else None
    fills = values is not None and values.numel() == 1 and values.device.type == "cpu"  # torch calls masked_fill
    indices = list(_tensors(args[1])) if name in INDEXING else []
    if moved and device.type == "meta":
        return
    if moved and device.type == "cpu":
        if not _is_not_waited_for(name, args, kwargs):
            gpu.wait()
    elif moved:
        if source.data_ptr() not in gpu.pinned:
            gpu.pageable[_line()] += 1
    elif name in WAITS or (any(t.dtype == torch.bool for t in indices) and not fills):
        gpu.wait()
    elif device.type == "cuda" and not op.is_view and name not in NO_LAUNCH and not name.startswith("prim::"):
        gpu.launches[_line()] += 1
    if device.type == "cuda" and any(t.device.type == "cpu" and t.dim() for t in indices):
        gpu.pageable[_line()] += 1


def _line() -> str:
    """The innermost file and line of the package on the stack."""
    frame = sys._getframe(1)
    while frame is not None:
        if (file := _file(frame.f_code.co_filename)) is not None:
            return f"{file}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "outside the package"


@cache
def _file(path: str) -> str | None:
    """The path below the package; None outside."""
    return path.removeprefix(f"{PACKAGE}/") if path.startswith(PACKAGE) else None


def _from_numbers(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``torch.tensor`` and ``as_tensor`` make a CPU tensor and move it, in C++ that a mode does not see."""

    def made(data: Any, dtype: torch.dtype | None = None, device: Any = None, **options: Any) -> Tensor:
        if isinstance(data, FakeCudaTensor):
            return data.to(device=data.device if device is None else device, dtype=dtype or data.dtype)
        tensor = function(data, dtype=dtype, **options)
        return tensor if device is None else torch.empty_like(tensor, device=device).copy_(tensor)

    return made


@contextmanager
def _eager_compressed_tensors() -> Iterator[None]:
    """compressed-tensors starts Triton kernels of its own on CUDA, which cannot run here, and keeps tensors."""
    import compressed_tensors.utils.impl_backend as backend
    from compressed_tensors.quantization.utils import helpers

    forget = helpers._calculate_range.cache_clear
    with mock.patch.object(backend, "ENFORCE_EAGER", True):
        forget()
        yield
        forget()
