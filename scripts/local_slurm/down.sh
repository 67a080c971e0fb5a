#!/usr/bin/env bash
# Stop the cluster that up.sh started in DIR: its jobs first, then the daemons by their pid files. Logs stay.
#
#   scripts/local_slurm/down.sh DIR
set -euo pipefail

dir=${1:?expected: down.sh DIR, the folder given to up.sh}
export SLURM_CONF=$dir/slurm.conf
if [[ ! -e $SLURM_CONF ]]; then
    echo "no cluster in $dir: $SLURM_CONF is missing" >&2
    exit 1
fi

jobs=$(timeout 5 squeue --noheader --format=%A 2> /dev/null || true)
if [[ -n $jobs ]]; then
    # shellcheck disable=SC2086    # one argument per job
    timeout 5 scancel $jobs || true
    for _ in $(seq 50); do    # KillWait is 5 s
        [[ -n $(timeout 5 squeue --noheader 2> /dev/null || true) ]] || break
        sleep 0.2
    done
fi

for daemon in slurmd_n0 slurmd_n1 slurmctld munged; do
    file=$dir/run/$daemon.pid
    [[ -s $file ]] || continue
    pid=$(< "$file")
    kill "$pid" 2> /dev/null || true
    for _ in $(seq 50); do
        kill -0 "$pid" 2> /dev/null || break
        sleep 0.1
    done
    kill -9 "$pid" 2> /dev/null || true
    rm -f "$file"
done
