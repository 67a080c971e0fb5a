#!/usr/bin/env bash
# A SLURM of two "nodes" on this one machine, for tests: two slurmd, one slurmctld, one munged, all on 127.0.0.1.
#
#   apt-get install -y --no-install-recommends slurm-wlm munge    # Debian, Ubuntu; their slurmd has -N (several per host)
#   eval "$(scripts/local_slurm/up.sh DIR)"     # about a second; DIR gets configuration, logs, pid files
#   sinfo                                       # n[0-1] idle
#   scripts/local_slurm/down.sh DIR
#
# No systemd, no cgroups, no accounting (so no sacct), nothing outside DIR. Ports: LOCAL_SLURM_PORT (16817) and two more.
# It prints what to export: SLURM_CONF, and for the ranks of a job, as the node names resolve for Slurm only, MASTER_ADDR
# and GLOO_SOCKET_IFNAME.
set -euo pipefail

dir=${1:?expected: up.sh DIR (an empty or new folder)}
port=${LOCAL_SLURM_PORT:-16817}
for program in munged slurmctld slurmd sinfo; do
    if ! command -v "$program" > /dev/null; then
        echo "$program is not installed: apt-get install slurm-wlm munge" >&2
        exit 1
    fi
done
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
if [[ -e $dir/run/slurmctld.pid ]]; then
    echo "$dir already holds a cluster: scripts/local_slurm/down.sh $dir" >&2
    exit 1
fi
mkdir -p "$dir"/{state,spool_n0,spool_n1,log,run}
chmod 755 "$dir" "$dir/run"    # munge refuses a socket below a folder that others may write
host=$(hostname -s)
user=$(id -un)

cat > "$dir/slurm.conf" <<EOF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$dir/run/munge.socket
# loopback only: without this line the daemons listen on every interface
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool_%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd_%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd_%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
ReturnToService=2
JobRequeue=1
MinJobAge=3600
KillWait=5
SlurmdParameters=config_overrides
NodeName=n0 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=2 RealMemory=2000 State=UNKNOWN
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=2 RealMemory=2000 State=UNKNOWN
PartitionName=debug Nodes=n0,n1 Default=YES MaxTime=INFINITE State=UP
EOF

if [[ ! -s $dir/run/munge.key ]]; then
    (umask 077 && head -c 128 /dev/urandom > "$dir/run/munge.key")
fi
munged --force --key-file="$dir/run/munge.key" --socket="$dir/run/munge.socket" --pid-file="$dir/run/munged.pid" \
    --log-file="$dir/log/munged.log" --seed-file="$dir/run/munge.seed"
slurmctld -c -f "$dir/slurm.conf"
slurmd -f "$dir/slurm.conf" -N n0
slurmd -f "$dir/slurm.conf" -N n1

export SLURM_CONF=$dir/slurm.conf
for _ in $(seq 50); do
    if [[ $(sinfo --noheader --Node --format=%t 2> /dev/null | grep -c idle) == 2 ]]; then
        echo "export SLURM_CONF=$SLURM_CONF MASTER_ADDR=127.0.0.1 GLOO_SOCKET_IFNAME=lo"
        exit 0
    fi
    sleep 0.2
done
echo "the nodes did not become idle within 10 s; see $dir/log" >&2
exit 1
