#!/usr/bin/env bash
# bash bench/run.sh SECONDS LINES ARGUMENTS...: run pytest with benchmarks until SECONDS are over, and then say which rows
# are missing. After a way has ended the process, or was ended because it hung, another process goes on behind it.
# LINES gets a line for each row as it comes. PYTHON names the interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."
end=$((SECONDS + $1)) lines=$2 python=${PYTHON:-python3}
shift 2
while
  before=$(wc -c "$lines" 2>&1)
  timeout --foreground --signal=INT --kill-after=20 $((end - SECONDS)) "$python" -m pytest -p no:cacheprovider --lines="$lines" "$@"
  status=$?
  [ -e "$lines" ] && ! tail -n 1 "$lines" | grep -q '^{"end"' && [ "$before" != "$(wc -c "$lines")" ] && [ $SECONDS -lt $end ]
do :; done
"$python" -m bench.measure.lines "$lines"
exit $status
