#!/usr/bin/env bash
# On a bare GPU machine (torch, triton, pytest, pytest-benchmark and matplotlib; nothing installed, this checkout
# neither), each inside ten minutes:
#     bash bench/on_gpu.sh first [COMMIT]    nine minutes: the most important benchmarks, constants, races, profile and tests
#     bash bench/on_gpu.sh test [COMMIT]     the tests on the real kernels, and compute-sanitizer
#     bash bench/on_gpu.sh bench [COMMIT]    all benchmarks, of trainers that are installed, too, and the report
# Each way of a benchmark is compared with the formula in float64 before it is timed. COMMIT names the commit where git
# cannot. $OUT, by default bench/results/first for `first` and .benchmarks for the others, gets a line for each row as it
# comes, the logs, and the tables. bench/on_gpu.ipynb runs `first` in a notebook.
set -uo pipefail
cd "$(dirname "$0")/.."
what=${1:?first, test or bench}
export COMMIT=${2:-} PYTHONUNBUFFERED=1 KINETO_LOG_LEVEL=99 PYTHON=${PYTHON:-python3}
about="import torch, triton, sys; torch.cuda.is_available() or sys.exit('expected a GPU, got none')
from bench.measure import machine; print(machine.device_name(), 'torch', torch.__version__, 'triton', triton.__version__)"
"$PYTHON" -c "$about" || exit 1
out=${OUT:-$([ "$what" = first ] && echo bench/results/first || echo .benchmarks)}
mkdir -p "$out"

bench() {  # SECONDS LINES ARGUMENTS...
  local seconds=$1 lines=$out/$2
  shift 2
  echo "== bench $* for $seconds s"
  rm -f "$lines"
  bash bench/run.sh "$seconds" "$lines" -v --tb=line --benchmark-max-time=0.1 "$@"
  for page in "bench.measure.report --show" bench.offline.roofline; do "$PYTHON" -m $page "$lines"; done > "${lines%.jsonl}.md"
}

tests() {  # SECONDS FILES...: run the tests of each file in a process of its own, so that a crash loses no other file
  local end=$((SECONDS + $1)) file
  shift
  for file in "$@"; do
    echo "== tests of $file"
    if [ $SECONDS -ge $end ]; then echo "not reached"; continue; fi
    timeout --foreground --signal=INT --kill-after=20 $((end - SECONDS)) \
      "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu --tb=short "$file"
  done
}

profile() {  # what the driver and Nsight Compute say, if it is there
  nvidia-smi --query-gpu=driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu --format=csv
  timeout 30 ncu --section SpeedOfLight --section Occupancy -k regex:ar_tar_kernel -c 4 \
    "$PYTHON" -m pytest -q bench/test_call.py -k "penalty-64x70x400-bfloat16-batch_first-fastreg" --benchmark-disable
}

# Files with tests for a GPU name its mark or the fixture of devices. Large tensors come last.
files=$(grep -rlE '\b(gpus?|device)\b' tests/{kernels,call,attach}/test_*.py | grep -v -e test_order -e test_large)
sanitized=(-m pytest -q -p no:cacheprovider -m gpu tests/kernels/test_kernels.py -k programs_share)
case $what in
  first)
    bench 230 first.jsonl bench -m first
    bench 90 sweep.jsonl bench/test_call.py -k sweep
    tests 40 tests/kernels/test_order.py
    profile
    tests $((540 - SECONDS)) $files ;;  # with the time that the parts before have not used
  test)
    tests 450 tests/kernels/test_order.py $files tests/kernels/test_large.py
    for tool in memcheck racecheck; do  # with its caching allocator PyTorch hides an access behind the end of a tensor
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 75 compute-sanitizer --tool $tool --report-api-errors no \
        "$PYTHON" "${sanitized[@]}"
    done ;;
  bench)
    bench 500 bench.jsonl bench
    "$PYTHON" -m bench.measure.report "$out/bench.jsonl" ;;
  *) echo "expected first, test or bench, got $what"; exit 2 ;;
esac 2>&1 | tee "$out/$what.log"
