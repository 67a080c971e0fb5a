"""The console command: help without torch, errors and warnings of one line."""

import subprocess
import sys
import warnings

import pytest

from lightning_compress.cli import command, main


def test_help_needs_no_torch():
    code = "import sys; from lightning_compress import cli; print('torch' in sys.modules); cli.main(['--help'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("False\nusage: lightning-compress [-h] COMMAND ...\n")
    assert "sweep     one table and one figure of a sweep" in done.stdout


@pytest.mark.parametrize("name", ["run", "plan", "report", "verify", "export", "sweep"])
def test_each_help_has_an_example(name, capsys):
    with pytest.raises(SystemExit, match="^0$"):
        main([name, "--help"])
    assert f"    lightning-compress {name} " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("two\n  lines"), 2, "lightning-compress: two lines\n"),
        (OSError(28, "No space left on device"), 2, "lightning-compress: [Errno 28] No space left on device\n"),
        (KeyboardInterrupt(), 130, "lightning-compress: interrupted\n"),
    ],
    ids=["value", "disk", "interrupt"],
)
def test_an_error_is_one_line(error, code, line, monkeypatch, capsys):
    def act(_options):
        warnings.warn("not all\nis well", stacklevel=1)
        warnings.warn("for programmers", DeprecationWarning, stacklevel=1)
        raise error

    monkeypatch.setattr(command.sweep, "act", act)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["sweep", "x"]) == code
    assert capsys.readouterr().err == f"lightning-compress: warning: not all is well\n{line}"
