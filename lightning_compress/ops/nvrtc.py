"""Kernels in CUDA C++ without a build step: NVRTC compiles them at first use, and the machine code is stored on disk.

libnvrtc and libcuda are called through ctypes; their C interfaces have been stable for years, and NVRTC is installed
with torch for CUDA. torch.cuda._compile_kernel does the same, but it is private, stores nothing on disk, and needs the
headers of a CUDA toolkit, which torch from PyPI lacks; cuda.bindings would be one more dependency.

Machine code is stored in $XDG_CACHE_HOME/lightning_compress (or ~/.cache/...), under the hash of all inputs of the
compiler (code_cache.py).
"""

import ctypes
import hashlib
import importlib.util
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from lightning_compress.ops.code_cache import CodeCache

__all__ = ["Kernel", "UnavailableError", "compiled", "load", "library"]

MAX_DYNAMIC_SHARED_SIZE = 8  # CU_FUNC_ATTRIBUTE_...


class UnavailableError(RuntimeError):
    """NVRTC is missing or cannot compile for this GPU, or the driver rejects the machine code."""


class Kernel:
    """A kernel on one device.

    Args:
        driver: The library libcuda.
        function: Handle of the kernel, a CUfunction.
    """

    def __init__(self, driver: Any, function: ctypes.c_void_p):
        self.driver, self.function = driver, function

    def __call__(self, blocks: int, threads: int, shared: int, arguments: Sequence[Any]) -> None:
        """Launch on torch's current stream.

        Args:
            blocks: Number of blocks in the grid.
            threads: Number of threads in a block.
            shared: Bytes of dynamic shared memory.
            arguments: ctypes values, in the order and of the types of the kernel's parameters.
        """
        pointers = (ctypes.c_void_p * len(arguments))(*[ctypes.addressof(value) for value in arguments])
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        _driver_ok(
            self.driver,
            self.driver.cuLaunchKernel(self.function, blocks, 1, 1, threads, 1, 1, shared, stream, pointers, None),
        )


def load(source: str, name: str, options: Sequence[str], device: torch.device, shared: int) -> Kernel:
    """The kernel ``name`` of ``source`` on a CUDA device, compiled unless its machine code is stored.

    Args:
        source: CUDA C++ without headers; the kernel is extern "C".
        name: Name of the kernel.
        options: Options of NVRTC but for the architecture.
        device: A CUDA device with an index.
        shared: Bytes of dynamic shared memory that a launch may use.

    Raises:
        UnavailableError: The kernel cannot be compiled or loaded; the message gives the reason.
        RuntimeError: A CUDA graph is being captured, which loading would end.
    """
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{name} cannot be loaded while a CUDA graph is captured; run the code once on {device} before the capture"
        )
    major, minor = torch.cuda.get_device_capability(device)
    code = compiled(source, [*options, f"--gpu-architecture=sm_{major}{minor}"])
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise UnavailableError(f"libcuda.so.1 cannot be loaded: {error}") from error
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    with torch.cuda.device(device):
        torch.cuda.current_stream().query()  # the runtime makes its context this thread's
        try:
            _driver_ok(driver, driver.cuModuleLoadData(ctypes.byref(module), code))
            _driver_ok(driver, driver.cuModuleGetFunction(ctypes.byref(function), module, name.encode()))
            _driver_ok(driver, driver.cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED_SIZE, shared))
        except RuntimeError as error:
            raise UnavailableError(f"the driver rejects {name}: {error}") from error
    return Kernel(driver, function)


def compiled(source: str, options: Sequence[str]) -> bytes:
    """Machine code (a cubin), read from the disk if it is stored there.

    Args:
        source: CUDA C++ without headers.
        options: Options of NVRTC, one of them --gpu-architecture=sm_..

    Raises:
        UnavailableError: NVRTC is missing or reports an error.
    """
    nvrtc = library()
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    inputs = "\0".join([source, *options, f"{major.value}.{minor.value}"])
    stored, key = CodeCache(_folder()), hashlib.sha256(inputs.encode()).hexdigest()
    if (code := stored.read(key)) is None:
        code = _compile(nvrtc, source, options)
        stored.write(key, code)
    return code


@cache
def library() -> Any:
    """The library libnvrtc, preferably of torch's CUDA version.

    Raises:
        UnavailableError: It is not installed.
    """
    torch_major = str(torch.version.cuda).split(".")[0]
    majors = sorted(("13", "12"), key=lambda major: major != torch_major)
    names = [f"libnvrtc.so.{major}" for major in majors]
    spec = importlib.util.find_spec("nvidia")
    folders = list(spec.submodule_search_locations or []) if spec else []
    packaged = [str(p) for name in names for folder in folders for p in sorted(Path(folder).glob(f"*/lib/{name}"))]
    for name in [*names, *packaged, "libnvrtc.so"]:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise UnavailableError("NVRTC is not installed (pip install nvidia-cuda-nvrtc, of the CUDA version of torch)")


def _compile(nvrtc: Any, source: str, options: Sequence[str]) -> bytes:
    program = ctypes.c_void_p()
    _ok(nvrtc, nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None))
    try:
        texts = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
        size = ctypes.c_size_t()
        if nvrtc.nvrtcCompileProgram(program, len(options), texts):
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            raise UnavailableError(f"NVRTC cannot compile the kernel: {log.value.decode(errors='replace').strip()}")
        _ok(nvrtc, nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        code = ctypes.create_string_buffer(size.value)
        _ok(nvrtc, nvrtc.nvrtcGetCUBIN(program, code))
        return code.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_compress"


def _ok(nvrtc: Any, result: int) -> None:
    if result:
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise UnavailableError(f"NVRTC: {nvrtc.nvrtcGetErrorString(result).decode()}")


def _driver_ok(driver: Any, result: int) -> None:
    if result:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(result, ctypes.byref(text))
        raise RuntimeError(f"CUDA driver: {(text.value or b'unknown error').decode()} ({result})")
