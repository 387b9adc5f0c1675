#!/usr/bin/env bash
# On a bare GPU machine (torch, triton, pytest and matplotlib; transformers and lightning for their training steps; nothing
# installed, this checkout neither), each inside ten minutes:
#     bash bench/on_gpu.sh first [COMMIT]    nine minutes: values, headline benchmarks, constants, races, profile and tests
#     bash bench/on_gpu.sh test [COMMIT]     the tests on the real kernels, and compute-sanitizer
#     bash bench/on_gpu.sh bench [COMMIT]    all benchmarks, the most wanted first, and the report
# COMMIT says what the checkout is where git cannot. $LIMIT is the seconds of `first` (540), or after which `test` and `bench`
# begin nothing more (450). Findings are on disk as they come, in $OUT where it is set: of `first` its lines and tables,
# otherwise in bench/results/first; of `bench` its lines, otherwise in .benchmarks. The results of `test` and `bench` go to
# bench/results, and at the end to $OUT as well; bench/results/tests has to be there for the report to tell the outcome of
# the tests. bench/on_gpu.ipynb runs `first` in a notebook.
set -uo pipefail
cd "$(dirname "$0")/.."
what=${1:?first, test or bench}
export COMMIT=${2:-} PYTHONUNBUFFERED=1
out=${OUT:-.benchmarks}
mkdir -p "$out"
log=$out/$what.log
python=${PYTHON:-python3}
"$python" -c "import torch, triton; print(torch.cuda.get_device_name(), 'torch', torch.__version__, 'triton', triton.__version__)" \
  || exit 1
start=$(mktemp)
case $what in
  first) limit=${LIMIT:-540} command=(bench.measure.first "${OUT:-bench/results/first}" --seconds="$limit") spare=20 ;;
  test) limit=${LIMIT:-450} command=(bench.measure.run test bench/results --seconds="$limit") spare=90 ;;
  bench) limit=${LIMIT:-450} command=(bench.measure.run bench bench/results --seconds="$limit" --lines="$out/bench.jsonl") spare=90 ;;
esac
# What begins by then ends in time. If not, SIGTERM ends it, and what there is is written.
timeout --kill-after=20 $((limit + spare)) "$python" -m "${command[@]}" 2>&1 | tee "$log"
status=${PIPESTATUS[0]}
[ "$what" != bench ] || "$python" -m bench.measure.report 2>&1 | tee -a "$log"
if [ -n "${OUT:-}" ] && [ "$what" != first ]; then
  for json in $(cd bench/results && find . -name '*.json' -newer "$start"); do
    (cd bench/results && cp --parents "$json" $(find "${json%.json}.md" "${json%.json}"-*.svg 2> /dev/null) "$OUT")
  done
fi
exit "$status"
