"""Machine code is compiled again where the file is damaged, or another user could have written it."""

import ctypes
import os
import warnings

import pytest

from lightning_compress.ops import code_cache, nvrtc
from lightning_compress.ops.code_cache import CodeCache

pytestmark = pytest.mark.skipif(not hasattr(os, "getuid"), reason="files have no owners here")


class Compiler:
    """Stands for libnvrtc: each code tells how many were compiled before it."""

    compiled = 0

    def nvrtcVersion(self, major, minor):
        return 0

    def nvrtcCreateProgram(self, *_):
        return 0

    def nvrtcCompileProgram(self, *_):
        self.compiled += 1
        return 0

    def nvrtcGetCUBINSize(self, program, size):
        size._obj.value = 5
        return 0

    def nvrtcGetCUBIN(self, program, code):
        ctypes.memmove(code, b"cubi%d" % self.compiled, 5)
        return 0

    def nvrtcDestroyProgram(self, program):
        return 0


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    fake = Compiler()
    monkeypatch.setattr(nvrtc, "library", lambda: fake)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return fake


def compiled():
    return nvrtc.compiled("source", ["--gpu-architecture=sm_90"])


def folder_of(tmp_path):
    return tmp_path / "cache" / "lightning_compress"


def test_code_is_compiled_once_and_stored_for_its_user_alone(tmp_path, compiler):
    before = os.umask(0)
    try:
        assert [compiled(), compiled()] == [b"cubi1", b"cubi1"]
    finally:
        os.umask(before)
    (file,) = folder_of(tmp_path).iterdir()
    assert folder_of(tmp_path).stat().st_mode & 0o777 == 0o700
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "damage",
    [lambda b: b"", lambda b: b[:39], lambda b: b[:-1], lambda b: b + b"x", lambda b: b[:-1] + b"x",
     lambda b: bytes(45), lambda b: b[40:]],
    ids=["empty", "half a header", "cut", "longer", "one byte", "zeros", "without a header"],
)  # fmt: skip
def test_a_damaged_file_is_compiled_again(tmp_path, compiler, damage):
    compiled()
    (file,) = folder_of(tmp_path).iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert [compiled(), compiled()] == [b"cubi2", b"cubi2"]
    assert list(folder_of(tmp_path).iterdir()) == [file]


def test_a_link_and_a_file_that_others_may_write_are_not_read(tmp_path, compiler):
    compiled()
    (file,) = folder_of(tmp_path).iterdir()
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert [compiled(), compiled()] == [b"cubi2", b"cubi2"]
    assert not file.is_symlink()
    file.chmod(0o622)
    assert compiled() == b"cubi3"


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777])
def test_a_folder_that_others_may_write_into_is_not_used(tmp_path, compiler, mode):
    compiled()
    folder_of(tmp_path).chmod(mode)
    with pytest.warns(UserWarning, match=r"lightning_compress belongs to another user, or others .* chmod 700"):
        assert compiled() == b"cubi2"
    assert len(list(folder_of(tmp_path).iterdir())) == 1


def test_a_folder_of_another_user_is_not_used(tmp_path, monkeypatch):
    codes = CodeCache(tmp_path / "codes")
    codes.write("key", b"code")
    assert codes.read("key") == b"code"
    uid = os.getuid()
    monkeypatch.setattr(code_cache.os, "getuid", lambda: uid + 1)
    with pytest.warns(UserWarning, match="belongs to another user"):
        assert codes.read("key") is None


def test_a_disk_that_is_full_leaves_nothing(tmp_path, monkeypatch):
    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    codes = CodeCache(tmp_path / "codes")
    monkeypatch.setattr(code_cache.os, "fsync", no_space)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        codes.write("key", b"code")
        assert codes.read("key") is None
    assert list((tmp_path / "codes").iterdir()) == []
