"""Progress on a terminal and in a pipe: one row, few redraws, time left, nothing that stays on the screen."""

import io
import logging
import os
import pty
import re
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

from rich.console import Console

from lightning_compress.report.progress import ProgressReport

ROOT = Path(__file__).parents[2]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def in_terminal(script: str, *args: str) -> str:
    """What a script writes whose standard output is a terminal of 80 x 40."""
    leader, follower = pty.openpty()
    size = {"COLUMNS": "80", "LINES": "40", "TERM": "xterm"}
    env = os.environ | size | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *args], stdout=follower, stderr=subprocess.PIPE, env=env
    )
    os.close(follower)
    pieces: list[bytes] = []

    def read() -> None:
        try:
            while piece := os.read(leader, 1 << 16):
                pieces.append(piece)
        except OSError:  # the terminal is closed when its last writer ends
            pass

    reader = threading.Thread(target=read)
    reader.start()
    errors = process.communicate(timeout=240)[1]
    reader.join(timeout=60)
    os.close(leader)
    assert process.returncode == 0, errors.decode()
    return b"".join(pieces).decode(errors="replace")


def last_screen(text: str) -> list[str]:
    """The lines that stay on the screen, for the few control sequences that rich's bar uses."""
    lines, row = [""], 0
    for piece in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", text):
        if piece == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif piece == "\x1b[2K":
            lines[row] = ""
        elif re.fullmatch(r"\x1b\[\d*A", piece):
            row = max(0, row - int(piece[2:-1] or 1))
        elif piece[0] not in "\x1b\r":
            lines[row] += piece
    return [line for line in lines if line.strip()]


def test_a_pipe_gets_a_line_in_five_seconds_with_the_time_left():
    clock, out = Clock(), io.StringIO()
    with ProgressReport(True, Console(file=out), clock) as progress:
        for second in range(31):
            clock.now = float(second)
            progress("calibration", second // 10, 4, f"layers.{second // 10}, batch {second % 10}")
    assert out.getvalue().splitlines() == [
        "calibration: layers.0, batch 5: 0/4",
        "calibration: layers.1, batch 0: 1/4, 0:00:30 left",
        "calibration: layers.1, batch 5: 1/4, 0:00:45 left",
        "calibration: layers.2, batch 0: 2/4, 0:00:20 left",
        "calibration: layers.2, batch 5: 2/4, 0:00:25 left",
        "calibration: layers.3, batch 0: 3/4, 0:00:10 left",
    ]


def test_each_phase_has_a_clock_of_its_own():
    clock, out = Clock(), io.StringIO()
    with ProgressReport(True, Console(file=out), clock) as progress:
        progress("metric before", 1, 2)
        clock.now = 100.0
        progress("calibration", 0, 2)
        clock.now = 106.0
        progress("calibration", 1, 2)
    assert out.getvalue().splitlines() == ["calibration: 0/2", "calibration: 1/2, 0:00:06 left"]


def test_nothing_is_shown_where_nothing_is_wanted():
    out = io.StringIO()
    with ProgressReport(False, Console(file=out, force_terminal=True)) as progress:
        progress("calibration", 1, 2)
    assert out.getvalue() == ""


def test_a_terminal_shows_one_row_within_80_columns_and_keeps_nothing():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80)
    with ProgressReport(True, console) as progress:
        for layer in range(300):
            progress("calibration", layer // 10, 31, f"model.layers.{layer}: model.layers.{layer}.self_attn.q_proj")
        progress._bar.refresh()
        assert len(progress._bar.tasks) == 1
        progress("metric after", 1, 8)
        assert [task.description for task in progress._bar.tasks] == ["metric after"]
    text = out.getvalue()
    assert "29/31" in text
    assert "left" in text
    rows = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n").splitlines()
    assert max(map(len, rows)) <= 80
    assert last_screen(text) == []


def test_log_lines_go_above_the_bar_and_the_handler_gets_its_stream_back():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out, piped = Terminal(), io.StringIO()
    logger = logging.getLogger("an_app")
    handlers = [logging.StreamHandler(out), logging.StreamHandler(piped)]
    logger.handlers[:], logger.propagate = handlers, False
    try:
        with ProgressReport(True, Console(file=out, force_terminal=True, width=80)) as progress:
            progress("calibration", 1, 2)
            progress._bar.refresh()
            logger.warning("a line of the app")
            progress._bar.refresh()
        logger.warning("another")
    finally:
        logger.handlers.clear()
    assert "calibration" in out.getvalue()
    assert last_screen(out.getvalue()) == ["a line of the app", "another"]
    assert piped.getvalue() == "a line of the app\nanother\n"
    assert [handler.stream for handler in handlers] == [out, piped]


def test_ten_thousand_updates_on_a_terminal_are_drawn_a_few_times():
    script = """
    import time
    from lightning_compress.report.progress import ProgressReport
    began = time.process_time()
    with ProgressReport(True) as progress:
        for i in range(10_000):
            progress("calibration", i // 100, 100, f"model.layers.{i // 100}: q_proj, batch {i % 100}/100")
    print("cpu", time.process_time() - began)
    """
    text = in_terminal(script)
    cpu = float(text.rsplit("cpu", 1)[1])
    assert cpu < 10  # 0.02 s here; one row for each text took minutes
    assert len(text) < 200_000
    assert [line.split()[0] for line in last_screen(text)] == ["cpu"]


def test_calibration_on_a_terminal_costs_no_more_than_in_a_pipe(tmp_path):
    script = """
    import sys, time
    import lightning as L
    import torch
    from lightning.pytorch.callbacks import RichProgressBar
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset
    from lightning_compress import CompressionCallback, GPTQModifier

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(32)
            for name in ("q", "k", "v", "o", "gate", "up", "down"):
                setattr(self, name, nn.Linear(32, 32))

        def forward(self, x):
            h = self.norm(x)
            h = self.o(self.q(h) * self.k(h) + self.v(h)) + x
            return self.down(torch.sigmoid(self.gate(h)) * self.up(h)) + h

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = nn.Sequential(*[Block() for _ in range(int(sys.argv[1]))])

        def training_step(self, batch, i):
            return self.model(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    torch.manual_seed(0)
    data = DataLoader(TensorDataset(torch.randn(64, 8, 32)), 4)
    began = time.process_time()
    L.Trainer(max_epochs=0, logger=False, accelerator="cpu", enable_checkpointing=False, default_root_dir=sys.argv[2],
              callbacks=[CompressionCallback(GPTQModifier(scheme="W8A16", group_size=-1))]).fit(Module(), data)
    print("cpu", time.process_time() - began)
    L.Trainer(max_epochs=1, logger=False, accelerator="cpu", enable_checkpointing=False,
              default_root_dir=sys.argv[2] + "/rich", callbacks=[RichProgressBar(), CompressionCallback(
                  GPTQModifier(scheme="W8A16", group_size=-1))]).fit(Module(), data)
    """
    text = in_terminal(script, "4", str(tmp_path))
    plain, rich = text.split("\ncpu")
    cpu = float(rich.split()[0])
    assert cpu < 30  # 0.44 s here; one row of the bar for each layer and batch took 102 s
    for text in (plain, rich):  # Lightning's rich bar is live until the end of fit, over what it finds
        screen = last_screen(text)
        assert not [line for line in screen if re.search(r"batch \d+/16|\d:\d\d left", line)], screen
        assert [line.split(":")[0] for line in screen][-1] == "compressed model", screen
