"""NVRTC and the driver are played: which library is loaded, what is compiled, what an error says."""

import ctypes

import pytest
import torch

from lightning_compress.ops import nvrtc
from tests.support.fake_cuda import fake_cuda


@pytest.fixture
def libraries(monkeypatch):
    """Names of the libraries that were tried; none of them loads."""
    names = []

    def load(name):
        names.append(name)
        raise OSError(f"no {name}")

    nvrtc.library.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", load)
    yield names
    nvrtc.library.cache_clear()


@pytest.mark.parametrize(("version", "first"), [("12.8", "libnvrtc.so.12"), ("13.0", "libnvrtc.so.13")])
def test_the_library_of_torchs_cuda_version_is_tried_first(libraries, monkeypatch, version, first):
    monkeypatch.setattr(torch.version, "cuda", version)
    with pytest.raises(nvrtc.UnavailableError, match="NVRTC is not installed .pip install nvidia-cuda-nvrtc"):
        nvrtc.library()
    assert libraries[0] == first
    assert {"libnvrtc.so.12", "libnvrtc.so.13", "libnvrtc.so"} <= set(libraries)


def test_the_log_of_the_compiler_is_in_the_error():
    class Library:
        destroyed = False

        def nvrtcCreateProgram(self, program, source, name, *_):
            assert (source, name) == (b"int x", b"kernel.cu")
            return 0

        def nvrtcCompileProgram(self, program, count, options):
            assert [options[i] for i in range(count)] == [b"--fmad=false", b"-DZERO=1"]
            return 6

        def nvrtcGetProgramLogSize(self, program, size):
            size._obj.value = 32
            return 0

        def nvrtcGetProgramLog(self, program, log):
            log.value = b"kernel.cu(1): error: expected ;\n"
            return 0

        def nvrtcDestroyProgram(self, program):
            self.destroyed = True
            return 0

    library = Library()
    with pytest.raises(nvrtc.UnavailableError) as error:
        nvrtc._compile(library, "int x", ["--fmad=false", "-DZERO=1"])
    assert str(error.value) == "NVRTC cannot compile the kernel: kernel.cu(1): error: expected ;"
    assert library.destroyed


def test_a_missing_driver_is_named(libraries, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    options = []
    monkeypatch.setattr(nvrtc, "compiled", lambda source, words: options.extend(words) or b"code")
    with pytest.raises(nvrtc.UnavailableError, match=r"libcuda\.so\.1 cannot be loaded: no libcuda\.so\.1"):
        nvrtc.load("source", "kernel", ["-DX"], torch.device("cuda:0"), 0)
    assert options == ["-DX", "--gpu-architecture=sm_90"]


def test_a_kernel_is_not_loaded_while_a_graph_is_captured(monkeypatch):
    with fake_cuda():
        for name in ("is_initialized", "is_current_stream_capturing"):
            monkeypatch.setattr(torch.cuda, name, lambda: True)
        monkeypatch.setattr(nvrtc, "compiled", lambda *_: pytest.fail("compiled in a capture"))
        with pytest.raises(RuntimeError, match="gptq_block cannot be loaded .* run the code once on cuda:1 before"):
            nvrtc.load("", "gptq_block", [], torch.device("cuda:1"), 0)
