#!/usr/bin/env bash
# On a bare GPU machine (torch, triton, pytest, pytest-benchmark and matplotlib; transformers and lightning for their
# training steps; nothing installed, this checkout neither), each inside ten minutes:
#     bash bench/on_gpu.sh first [COMMIT]    nine minutes: values, headline benchmarks, constants, races, profile and tests
#     bash bench/on_gpu.sh test [COMMIT]     the tests on the real kernels, and compute-sanitizer
#     bash bench/on_gpu.sh bench [COMMIT]    all benchmarks, the most wanted first, and the report
# COMMIT names the commit where git cannot. Nothing more begins after $LIMIT seconds (540 for `first`, 450 for `test` and
# `bench`). $OUT, by default bench/results/first for `first` and .benchmarks for the others, gets a line for each
# finding as it comes: of `first` in DEVICE.jsonl, beside which the tables go to DEVICE.md; of the others in test.jsonl and
# bench.jsonl. `bench` puts its result into bench/results, too. bench/on_gpu.ipynb runs `first` in a notebook.
set -uo pipefail
cd "$(dirname "$0")/.."
what=${1:?first, test or bench}
export COMMIT=${2:-} PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
about="import torch, triton; from bench.measure import machine; name = machine.device_name(); print(machine.file_name(name)); \
print(name, 'torch', torch.__version__, 'triton', triton.__version__)"
{ read -r device; read -r versions; } < <("$python" -c "$about")
[ -n "${versions:-}" ] || exit 1
echo "$versions"
case $what in
  first) out=${OUT:-bench/results/first} limit=${LIMIT:-540} spare=20 tests=(bench/test_first.py -k "not sanitizers") ;;
  test) out=${OUT:-.benchmarks} limit=${LIMIT:-450} spare=90 tests=(bench/test_first.py -k "files or sanitizers") ;;
  bench) out=${OUT:-.benchmarks} limit=${LIMIT:-450} spare=90 tests=(bench/test_cases.py "--benchmark-json=$out/bench.json") ;;
  *) echo "expected first, test or bench, got $what"; exit 2 ;;
esac
mkdir -p "$out"
lines=$out/$what.jsonl
[ "$what" != first ] || lines=$out/${device}l
# What has begun by then should end in the spare seconds. If not, SIGTERM ends pytest, which writes the results it has.
timeout --kill-after=20 $((limit + spare)) "$python" -m pytest -v -p no:cacheprovider --tb=line "${tests[@]}" \
  "--seconds=$limit" "--lines=$lines" 2>&1 | tee "$out/$what.log"
status=${PIPESTATUS[0]}
case $what in
  first) "$python" -m bench.measure.first "$lines" ;;
  bench) "$python" -m bench.measure.report "$out/bench.json" ;;
esac 2>&1 | tee -a "$out/$what.log"
exit "$status"
