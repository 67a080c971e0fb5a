"""Kernels in CUDA C++ without a build step: NVRTC compiles them at first use, and the machine code is kept on disk.

By ctypes on libnvrtc and libcuda, whose C interfaces have been the same for years; NVRTC comes with torch for CUDA.
torch.cuda._compile_kernel does the same, but is private, keeps nothing on disk, and before it compiles it asks for
the headers of a CUDA toolkit, which a torch from PyPI lacks; cuda.bindings is one more dependency.

Machine code lies in $XDG_CACHE_HOME/lightning_compress (or ~/.cache/...), named by all that went into it
(code_cache.py).
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
    """There is no NVRTC, or it does not compile for this GPU, or the driver does not take the result."""


class Kernel:
    """A kernel on one device.

    Args:
        driver: libcuda.
        function: CUfunction.
    """

    def __init__(self, driver: Any, function: ctypes.c_void_p):
        self.driver, self.function = driver, function

    def __call__(self, blocks: int, threads: int, shared: int, arguments: Sequence[Any]) -> None:
        """Launch on torch's current stream.

        Args:
            blocks: Of the grid.
            threads: Of a block.
            shared: Bytes of dynamic shared memory.
            arguments: ctypes values, as the kernel declares them.
        """
        pointers = (ctypes.c_void_p * len(arguments))(*[ctypes.addressof(value) for value in arguments])
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        _driver_ok(
            self.driver,
            self.driver.cuLaunchKernel(self.function, blocks, 1, 1, threads, 1, 1, shared, stream, pointers, None),
        )


def load(source: str, name: str, options: Sequence[str], device: torch.device, shared: int) -> Kernel:
    """The kernel ``name`` of ``source`` on a CUDA device, compiled if it has not been yet.

    Args:
        source: CUDA C++; the kernel is extern "C".
        name: Of the kernel.
        options: Of NVRTC.
        device: With an index.
        shared: Bytes of dynamic shared memory that a launch may ask for.

    Raises:
        UnavailableError: With the reason.
    """
    major, minor = torch.cuda.get_device_capability(device)
    code = compiled(source, [*options, f"--gpu-architecture=sm_{major}{minor}"])
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise UnavailableError(f"libcuda.so.1 does not load: {error}") from error
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    with torch.cuda.device(device):
        torch.cuda.current_stream().query()  # the runtime makes its context this thread's
        try:
            _driver_ok(driver, driver.cuModuleLoadData(ctypes.byref(module), code))
            _driver_ok(driver, driver.cuModuleGetFunction(ctypes.byref(function), module, name.encode()))
            _driver_ok(driver, driver.cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED_SIZE, shared))
        except RuntimeError as error:
            raise UnavailableError(f"the driver does not take {name}: {error}") from error
    return Kernel(driver, function)


def compiled(source: str, options: Sequence[str]) -> bytes:
    """Machine code (a cubin), from the disk where it lies there already.

    Args:
        source: CUDA C++ without headers.
        options: Of NVRTC; one is --gpu-architecture=sm_..

    Raises:
        UnavailableError: There is no NVRTC, or it reports an error.
    """
    nvrtc = library()
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    all_of_it = "\0".join([source, *options, f"{major.value}.{minor.value}"])
    kept, key = CodeCache(_folder()), hashlib.sha256(all_of_it.encode()).hexdigest()
    if (code := kept.read(key)) is None:
        code = _compile(nvrtc, source, options)
        kept.write(key, code)
    return code


@cache
def library() -> Any:
    """libnvrtc, of torch's own CUDA version first.

    Raises:
        UnavailableError: It is nowhere.
    """
    own = str(torch.version.cuda).split(".")[0]
    majors = sorted(("13", "12"), key=lambda major: major != own)
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
        words = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
        size = ctypes.c_size_t()
        if nvrtc.nvrtcCompileProgram(program, len(options), words):
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            raise UnavailableError(f"NVRTC does not compile it: {log.value.decode(errors='replace').strip()}")
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
