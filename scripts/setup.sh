#!/usr/bin/env bash
# The environment in which the demo and the tests run:  scripts/setup.sh [FOLDER]     (default: .venv; `make` calls it)
# CONSTRAINTS=FILE takes other pins than those of constraints.txt; TORCH_INDEX=URL takes torch itself from an index of its own.
# Needs Python 3.11+ (PYTHON=python3.12 chooses one) and the package registries. Run again, it mends or updates what is there.
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

# torch first, and pinned: left free, pip may fetch another build, gigabytes of CUDA libraries.
install=("$venv/bin/python" -m pip install --disable-pip-version-check --constraint "${CONSTRAINTS:-constraints.txt}")
[ -z "${TORCH_INDEX:-}" ] || "${install[@]}" --no-deps --index-url "$TORCH_INDEX" torch
"${install[@]}" torch
"${install[@]}" --editable ".[dev,hf,plot,kernels]"
