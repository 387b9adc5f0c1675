#!/usr/bin/env bash
# bash bench/before.sh COMMIT: build the fastreg of another commit as the package fastreg_before, beside fastreg. All
# benchmarks measure both, in turns, until that folder is removed. PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath --no-symlinks "${PYTHON:-.venv/bin/python}") tree=$(mktemp -d)
git archive "$1" | tar -x -C "$tree"
(cd "$tree" && "$python" setup.py --quiet build_ext)
rm -rf fastreg_before
cp -rL "$tree/fastreg" fastreg_before
find fastreg_before -name '*.py' -exec sed -i 's/\bfastreg\b/fastreg_before/g' {} +
rm -r "$tree"
