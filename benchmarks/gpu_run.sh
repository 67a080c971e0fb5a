#!/usr/bin/env bash
# What is to be known of the GPU of this machine, in one command of so many seconds; no network, no make, no root.
#
#     bash benchmarks/gpu_run.sh [SECONDS [STEP[=LIMIT]...]]        # 560 seconds, every step but `tune`
#     BENCH_WHEELS=FOLDER OUT=FOLDER PYTHON=python3 bash benchmarks/gpu_run.sh
#
# Each step is a process of its own with its own limit in seconds: a failure, a crash, a hang, or an error that ends the
# CUDA context costs that step alone. Right or wrong first, on tiny shapes of every op; then what decides; then the rest.
# After each step all results so far are in $OUT/gpu_run.tgz (OUT: gpu_results), and a line for each step in
# $OUT/steps.txt; at the end one report of all of them. Exit status: 1 if a step failed, 2 for wrong arguments.
set -u
cd "$(dirname "$0")/.." || exit 2

KNOWN="check memcheck w4a16_gemm whole_gptq hessian gptq_block decode w8a8_gemm fp4_gemm w4a8_gemm fake_quant hadamard pack mask_2of4 group_quant scale_search tune"
OPS="w4a16_gemm hessian gptq_block w8a8_gemm hadamard fp4_gemm w4a8_gemm fake_quant pack mask_2of4 group_quant scale_search"
SHAPES="1x4096x4096 16x4096x4096 1x8192x8192 16x8192x8192 1x14336x4096 16x28672x8192" # that `tune` tunes
SMALLEST=20 # seconds in which a step can get to a first figure: imports and rates take ten

seconds=${1:-560}
case $seconds in *[!0-9]* | '') echo "gpu_run: expected a number of seconds, got '$seconds'" >&2; exit 2 ;; esac
shift $(($# > 0))
wanted=" $* "
for word in "$@"; do
  case " $KNOWN " in *" ${word%%=*} "*) ;; *) echo "gpu_run: '$word' is not a step; expected some of $KNOWN" >&2; exit 2 ;; esac
  case $word in *=*[!0-9]* | *=) echo "gpu_run: expected STEP=SECONDS, got '$word'" >&2; exit 2 ;; esac
done
python=${PYTHON:-python3}
mkdir -p "${OUT:-gpu_results}" && out=$(cd "${OUT:-gpu_results}" && pwd) || exit 2
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=8 PYTHONPATH=.
end=$((SECONDS + seconds))
: >"$work/steps.txt"

asked() { [ "$wanted" = "  " ] || case $wanted in *" $1 "* | *" $1="*) ;; *) return 1 ;; esac; }
tell() { echo "$*" | tee -a "$work/steps.txt"; }
told() { # NAME STATUS SECONDS
  case $2 in 0) tell "$1: done, $3 s" ;; 3) tell "$1: failed, the CUDA context ended, $3 s" ;;
    124 | 137) tell "$1: failed, no end within $3 s" ;; *) tell "$1: failed with status $2, $3 s" ;; esac
}
keep() { # what there is so far; never half an archive
  cp "$work/steps.txt" "$out/steps.txt"
  tar czf "$out/gpu_run.tgz.part" -C "$work" . && mv "$out/gpu_run.tgz.part" "$out/gpu_run.tgz"
}
step() { # NAME LIMIT COMMAND...: at most LIMIT of the seconds that are left; @ in the command: 12 less than these
  local name=$1 limit=$2 left=$((end - SECONDS)) from=$SECONDS
  shift 2
  asked "$name" || return
  case $wanted in *" $name="*) limit=${wanted#*" $name="} limit=${limit%% *} ;; esac
  [ $left -ge $SMALLEST ] || { tell "$name: failed, no time was left"; return; }
  limit=$((left < limit ? left : limit))
  mkdir -p "$work/$name"
  BENCH_RESULTS="$work/$name" timeout -k 5 $limit "${@//@/$((limit > 24 ? limit - 12 : 12))}" >"$work/$name/log" 2>&1
  told "$name" $? $((SECONDS - from))
  tail -n 6 "$work/$name/log"
  keep
}
bench() { step "$1" "$2" "$python" benchmarks/bench_ops.py --seconds @ --ops "$1"; }
check() { # OP, on tiny shapes
  local from=$SECONDS
  timeout -k 5 75 "$python" benchmarks/bench_ops.py --check --ops "$1" >"$work/check/$1.log" 2>&1
  told "check of $1" $? $((SECONDS - from))
}

{ nvidia-smi; "$python" -c 'import torch, triton; print(torch.__version__, triton.__version__, torch.cuda.get_device_name())'; } >"$work/machine.txt" 2>&1
cat "$work/machine.txt"
if asked check; then # six processes at a time, since nothing is timed
  mkdir "$work/check"
  for op in $OPS; do
    while [ "$(jobs -r | wc -l)" -ge 6 ]; do wait -n; done
    check "$op" &
  done
  wait
  keep
fi
if command -v compute-sanitizer >/dev/null; then
  step memcheck 40 compute-sanitizer --tool memcheck --error-exitcode 9 "$python" benchmarks/bench_ops.py --check --ops w4a16_gemm
fi
bench w4a16_gemm 85
bench whole_gptq 90
bench hessian 35
bench gptq_block 30
bench decode 75
bench w8a8_gemm 45
bench fp4_gemm 30
bench w4a8_gemm 25
bench fake_quant 30
bench hadamard 25
bench pack 20
bench mask_2of4 20
bench group_quant 20
bench scale_search 20
if [ "$wanted" != "  " ]; then # only by its name: it writes the op's table, which is kept beside the results
  read -ra shapes <<<"$SHAPES"
  step tune 300 "$python" benchmarks/tune_ops.py --seconds @ --ops w4a16_gemm --shapes "${shapes[@]}"
  [ ! -d "$work/tune" ] || { cp lightning_compress/ops/w4a16_gemm/launch.json "$work/tune/" && keep; }
fi
BENCH_RESULTS="$out" timeout -k 5 40 "$python" benchmarks/bench_ops.py --merge "$work" || tell "report: failed, no results"
keep
echo "results: $out/gpu_run.tgz"
! grep -q ": failed" "$work/steps.txt"
