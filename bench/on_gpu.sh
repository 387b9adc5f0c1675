#!/usr/bin/env bash
# On a bare GPU machine (torch, triton, pytest, pytest-benchmark, hypothesis and matplotlib; nothing installed, this
# checkout neither): the tests on the real kernels, then the benchmarks, then the report, in under ten minutes.
# Results go to bench/results, and where $OUT is set, to it as well.
set -uo pipefail
cd "$(dirname "$0")/.."
log=${OUT:-bench/results}/run.log
mkdir -p "$(dirname "$log")"
export PYTHONUNBUFFERED=1
python3 -c "import torch, triton; print(torch.cuda.get_device_name(), 'torch', torch.__version__, 'triton', triton.__version__)" \
  || exit 1
start=$(mktemp)
# Out of time, the benchmarks end where they are, and what was measured is kept.
timeout --kill-after=30 530 python3 -m bench.run bench/results 2>&1 | tee "$log"
status=${PIPESTATUS[0]}
[ -n "$(find bench/results -name '*.json' -newer "$start")" ] || exit 1
python3 -m bench.report | tee -a "$log"
if [ -n "${OUT:-}" ]; then
  for json in $(find bench/results -name '*.json' -newer "$start"); do
    cp "${json%.json}".json "${json%.json}".md "${json%.json}"-*.svg "$OUT"
  done
fi
exit "$status"
