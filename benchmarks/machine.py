"""What a result was measured on, and where it is written: benchmarks/results/<what>_<machine>_<yyyymm>.{md,json}.

BENCH_RESULTS names another folder.
"""

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = Path(os.environ.get("BENCH_RESULTS") or HERE / "results")


def describe() -> dict[str, Any]:
    """Processor, cores, memory, load and the commit of this package."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "load_1min": round(os.getloadavg()[0], 1),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else []
    return names[0].strip() if names else platform.processor() or platform.machine()


def commit() -> str:
    """The commit that is checked out, with a + when files that are tracked differ from it."""

    def git(*words: str) -> str:
        try:
            answer = subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True, check=False)
        except OSError:  # a machine without git
            return ""
        return answer.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "../lightning_compress")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if changed else "")


def slug() -> str:
    """The machine in a file name: processor family and cores, such as ``amd-epyc-2c``."""
    words = re.sub(r"\(.*?\)|@.*|\b(cpu|processor|\d+-core)\b", " ", processor().lower())
    return "-".join(re.findall(r"[a-z0-9]+", words)[:3]) + f"-{os.cpu_count()}c"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of every bench that writes a result."""
    parser.add_argument("--machine", default="", help="name of this machine in the file name of the result")
    parser.add_argument("--dry", action="store_true", help="print only, write no result")


def write(what: str, title: str, lines: Sequence[str], facts: dict[str, Any], machine: str = "") -> Path:
    """Write the report and the figures behind it.

    Args:
        what: The bench, as in the file name.
        title: Heading of the report.
        lines: Markdown under the heading.
        facts: What the JSON file holds, beside the machine; ``machine`` in it if another one measured.
        machine: Name of the machine in the file name; empty: from the processor.

    Returns:
        The Markdown file.
    """
    about = facts.get("machine") or describe()
    RESULTS.mkdir(parents=True, exist_ok=True)
    stem = RESULTS / f"{what}_{machine or slug()}_{datetime.date.today():%Y%m}"
    head = [
        f"# {title}",
        "",
        f"{about['date']}, commit {about['commit']}, {about['processor']}, {about['cores']} cores, "
        f"{about['memory_gib']} GiB, Python {about['python']}, load average {about['load_1min']}.",
        "",
    ]
    report = stem.with_suffix(".md")
    report.write_text("\n".join([*head, *lines, ""]), encoding="utf8")
    stem.with_suffix(".json").write_text(json.dumps({"machine": about, **facts}, indent=1) + "\n", encoding="utf8")
    return report


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Markdown lines of a table."""
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows),
    ]
