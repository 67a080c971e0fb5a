"""Damaged files for every reader of the package: each is read right, or refused by an error that names the file.

    make fuzz                                                     30 seconds in all, a new seed each time
    make fuzz ARGS="--seconds 600"
    make fuzz ARGS="--seed 7 --reader load --case 41"             one case again

A case is a function of the seed, the reader and its number. What a reader may raise is a ValueError (or
FileNotFoundError) with the path in it, in bounded time and memory; anything else ends the run with the mutation.
"""

import argparse
import contextlib
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.utils import logging

from tests.fuzz.readers import READERS, Reader

SECONDS_OF_A_CASE = 20
MEMORY = 4 * 2**30  # beside what the process has at the start


class TooSlow(BaseException):
    """Not an Exception: no reader may take it for one of its own."""


def run_case(reader: Reader, template: Path, place: Path, seed: int, number: int) -> tuple[str, str | None]:
    """The mutation, and the fault if there is one: None where the file was read right or refused as it must be."""
    rng = random.Random(f"{seed}/{reader.name}/{number}")
    folder = place / "case"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(template, folder)
    mutation = reader.mutate(rng, folder)
    try:
        with warnings.catch_warnings(), time_limit(SECONDS_OF_A_CASE):
            warnings.simplefilter("ignore")
            reader.read(folder)
    except (ValueError, FileNotFoundError) as error:
        named = str(folder) in str(error) and type(error) in (ValueError, FileNotFoundError)
        return mutation, None if named else f"an error that names no file:\n{traceback.format_exc()}"
    except TooSlow:
        return mutation, f"not done after {SECONDS_OF_A_CASE} s:\n{traceback.format_exc()}"
    except Exception:
        return mutation, f"another error:\n{traceback.format_exc()}"
    return mutation, None


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """TooSlow after so many seconds."""

    def ring(*_: Any) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def main() -> int:
    """Run cases until the time is over; 1 when one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30, help="of all readers together")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--reader", choices=[reader.name for reader in READERS], default=None)
    parser.add_argument("--case", type=int, default=None, help="this one alone")
    asked = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if asked.seed is None else asked.seed
    chosen = [reader for reader in READERS if asked.reader in (None, reader.name)]
    print(f"seed {seed}", flush=True)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    failures: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as temporary:
        for reader in chosen:
            place = Path(temporary) / reader.name
            reader.make(place / "template")
            end = time.monotonic() + asked.seconds / len(chosen)
            number = asked.case or 0
            while time.monotonic() < end:
                mutation, fault = run_case(reader, place / "template", place, seed, number)
                if fault is not None:
                    failures[reader.name] += 1
                    again = f"--seed {seed} --reader {reader.name} --case {number}"
                    print(f"\nFAILED: {again}\nmutation: {mutation}\n{fault}", flush=True)
                number += 1
                if asked.case is not None or failures[reader.name] == 10:
                    break
            print(f"{reader.name}: {number - (asked.case or 0)} cases, {failures[reader.name]} failures", flush=True)
    return 1 if failures.total() else 0


if __name__ == "__main__":
    sys.exit(main())
