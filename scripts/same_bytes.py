"""Compare exports of many recipes on five tiny models, at a commit and in the working tree, byte for byte.

    python scripts/same_bytes.py --base c020411                    # make same-bytes BASE=c020411
    python scripts/same_bytes.py --base c020411 --only gptq        # only the cases whose name has "gptq" in it
    python scripts/same_bytes.py --list

Each case compresses a model of random weights with a fixed seed, saves it, loads it, and asks the loaded model for its
outputs. Compared are the sha256 of every exported file, the rows of modules.csv without ``seconds``, and the sha256 of
the outputs. ``export_manifest.json`` is left out: it names the run. One thread, on the CPU. Where files differ, the
tensors or lines that differ are named, and the exit status is 1; it is 1 as well where a case cannot be made.

Each side is a process of its own with its own package; scripts/same_bytes_cases.py of the working tree makes the cases
of both. The case ``recipes`` compares what is read of every recipe. The results of the commit are kept in the temporary
folder of this machine, by commit, by the text of that file, and by the versions of the libraries.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from same_bytes_cases import digest, names

ROOT = Path(__file__).resolve().parents[1]
CACHE = Path(tempfile.gettempdir()) / f"lightning-compress-same-bytes-{os.getuid()}"
LIBRARIES = ("torch", "transformers", "compressed-tensors", "lightning", "safetensors", "torch-pruning")
CASES = Path(__file__).with_name("same_bytes_cases.py")


def run_side(root: Path, chosen: list[str]) -> dict[str, Any]:
    """Results of ``chosen`` with the package at ``root``."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    fixed = {"PYTHONHASHSEED": "0", "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory(prefix="same-bytes-") as folder:
        out = Path(folder) / "results.json"
        command = [sys.executable, str(CASES), str(root), str(out), *chosen]
        subprocess.run(command, cwd=folder, env={**os.environ, **threads, **fixed}, check=True)
        return json.loads(out.read_text())


# -- both sides --------------------------------------------------------------------------------------------------------


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def results_of_commit(base: str, chosen: list[str]) -> dict[str, Any]:
    """As :func:`run_side`, in a worktree that is removed; cases that were run before come from the cache."""
    commit = git("rev-parse", "--verify", f"{base}^{{commit}}")
    setting = CASES.read_text() + "".join(f"{name} {version(name)}\n" for name in LIBRARIES)
    cache = CACHE / f"{commit[:12]}-{digest(setting.encode())[:12]}.json"
    known = json.loads(cache.read_text()) if cache.is_file() else {}
    if missing := [name for name in chosen if name not in known]:
        with tempfile.TemporaryDirectory(prefix="same-bytes-") as folder:
            tree = Path(folder) / "tree"
            git("worktree", "add", "--detach", str(tree), commit)
            try:
                known |= run_side(tree, missing)
            finally:
                git("worktree", "remove", "--force", str(tree))
        CACHE.mkdir(mode=0o700, exist_ok=True)
        partial = cache.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(known))
        partial.replace(cache)
    return {name: known[name] for name in chosen}


def differences(before: dict[str, dict[str, str]], after: dict[str, dict[str, str]]) -> list[str]:
    """One line for each file that differs, and up to three for its differences."""
    lines = []
    for file in sorted(before.keys() | after.keys()):
        old, new = before.get(file), after.get(file)
        if old is None or new is None:
            lines.append(f"{file}: only {'after' if old is None else 'before'}")
        elif old != new:
            parts = [p for p in [*old, *(p for p in new if p not in old)] if p and old.get(p) != new.get(p)]
            lines.append(f"{file}: {len(parts)} tensors, lines or fields differ" if parts else f"{file} differs")
            lines += [f"    {p}:\n      - {old.get(p, 'nothing')}\n      + {new.get(p, 'nothing')}" for p in parts[:3]]
    return lines


def compare(base: str, chosen: list[str]) -> int:
    """Print what differs; the exit status."""
    print(f"{len(chosen)} cases; {base}:", file=sys.stderr)
    before = results_of_commit(base, chosen)
    print("the working tree:", file=sys.stderr)
    after = run_side(ROOT, chosen)
    wrong = 0
    for name in chosen:
        lines = differences(before[name], after[name])
        if not lines and "error" in after[name]:
            lines = [f"cannot be made on either side: {after[name]['error']['']}"]
        if lines:
            wrong += 1
            print(f"{name}\n  " + "\n  ".join(lines))
    print(f"{len(chosen) - wrong} of {len(chosen)} cases are the same as at {base}")
    return int(wrong > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="the commit to compare with")
    parser.add_argument("--only", default="", help="a pattern that names of cases must have in them")
    parser.add_argument("--list", action="store_true", help="print the cases, run nothing")
    arguments = parser.parse_args()
    chosen = names(arguments.only)
    if not chosen:
        parser.error(f"--only {arguments.only} matches no case; --list prints them")
    if arguments.list:
        print("\n".join(chosen))
        return 0
    if not arguments.base:
        parser.error("--base needs a commit, such as --base main")
    return compare(arguments.base, chosen)


if __name__ == "__main__":
    sys.exit(main())
