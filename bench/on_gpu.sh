#!/usr/bin/env bash
# On a bare GPU machine (torch, triton, pytest, hypothesis; nothing installed, this checkout neither): the tests on the
# real kernels, then the benchmarks, in under ten minutes. Results go to $OUT, or to bench/results.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-bench/results}
mkdir -p "$out"
export PYTHONUNBUFFERED=1
python3 -c "import torch, triton; print(torch.cuda.get_device_name(), 'torch', torch.__version__, 'triton', triton.__version__)" \
  || exit 1
timeout 330 python3 -m pytest -m gpu -q 2>&1 | tee "$out/tests.log"
if [ "${PIPESTATUS[0]}" -ne 0 ]; then
  echo "the tests failed on this machine: nothing is measured"
  exit 1
fi
timeout 240 python3 -m bench.penalty 2>&1 | tee "$out/penalty.md"
