#!/usr/bin/env bash
# The environment in which the demo and the tests run:  scripts/setup.sh [FOLDER]     (default: .venv; `make` calls it)
# CONSTRAINTS=FILE replaces the pins of constraints.txt; TORCH_INDEX=URL installs torch from another index.
# Needs Python 3.11+ (PYTHON=python3.12 chooses one) and the package registries. Run again, it repairs or updates the environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${1:-.venv}
python=${PYTHON:-python3}

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "expected Python 3.11 or newer, $python is $("$python" --version 2>&1); set PYTHON=python3.12 or the like" >&2
    exit 1
fi
if ! "$python" -m venv "$venv"; then
    echo "$python cannot make environments; on Debian and Ubuntu: apt-get install python3-venv" >&2
    exit 1
fi

# torch first, and pinned: left free, pip may fetch another build, gigabytes of CUDA libraries. A build for CUDA brings the
# Triton that it was built with; the pin of Triton is for builds that bring none.
pins=${CONSTRAINTS:-constraints.txt}
free_triton=$venv/pins-but-triton.txt
grep -v '^triton==' "$pins" > "$free_triton"
install=("$venv/bin/python" -m pip install --disable-pip-version-check)
[ -z "${TORCH_INDEX:-}" ] || "${install[@]}" --constraint "$free_triton" --no-deps --index-url "$TORCH_INDEX" torch
"${install[@]}" --constraint "$free_triton" torch
brings_triton='from importlib.metadata import requires; exit(not any(r.startswith("triton") for r in requires("torch")))'
if "$venv/bin/python" -c "$brings_triton"; then pins=$free_triton; fi
"${install[@]}" --constraint "$pins" --editable ".[dev,hf,plot,kernels,slurm]"
