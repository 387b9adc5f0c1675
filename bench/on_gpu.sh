#!/usr/bin/env bash
# On a bare GPU machine (torch, triton, pytest and matplotlib; transformers and lightning for
# their training steps; nothing installed, this checkout neither), each well inside ten minutes:
#     bash bench/on_gpu.sh test [COMMIT]     the tests on the real kernels, and compute-sanitizer
#     bash bench/on_gpu.sh bench [COMMIT]    the benchmarks, the most wanted first, and the report
# COMMIT says what the checkout is where git cannot. $LIMIT is the seconds after which nothing more begins, 450. Results go
# to bench/results, and where $OUT is set, to it as well; the outcome of the tests, bench/results/tests, has to be there for
# the report to tell it. bench/on_gpu.ipynb runs both in a notebook.
set -uo pipefail
cd "$(dirname "$0")/.."
what=${1:?test or bench}
export COMMIT=${2:-}
limit=${LIMIT:-450}
log=${OUT:-.benchmarks}/$what.log
mkdir -p "$(dirname "$log")"
export PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
"$python" -c "import torch, triton; print(torch.cuda.get_device_name(), 'torch', torch.__version__, 'triton', triton.__version__)" \
  || exit 1
start=$(mktemp)
# What begins by then ends in time. If not, SIGTERM ends it, and what there is is written.
timeout --kill-after=20 $((limit + 90)) "$python" -m bench.run "$what" bench/results --seconds="$limit" 2>&1 \
  | tee "$log"
status=${PIPESTATUS[0]}
[ "$what" = test ] || "$python" -m bench.report 2>&1 | tee -a "$log"
if [ -n "${OUT:-}" ]; then
  for json in $(cd bench/results && find . -name '*.json' -newer "$start"); do
    (cd bench/results && cp --parents "$json" $(find "${json%.json}.md" "${json%.json}"-*.svg 2> /dev/null) "$OUT")
  done
fi
exit "$status"
