#!/bin/sh
# Every check there is, and the only gate: `make test` and continuous integration run this. Needs the environment's bin/ on the PATH.
set -eu
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 MPLBACKEND=agg MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=1
begin=$(date +%s)
step() { printf '\n== %s  [%s s]\n' "$1" "$(($(date +%s) - begin))"; }

step 'modules in step with notebooks'
python tools/in_step.py

step 'ruff'
ruff check .

step 'mypy'
mypy

step 'notebooks'
timeout 600 python tools/run_notebooks.py --workers "${WORKERS:-2}" --budget "${NOTEBOOK_BUDGET:-225}"

step 'docs site and README.md'
cp README.md "${TMPDIR:-/tmp}/readme.$$"
python tools/build_docs.py --engine sphinx
cmp -s README.md "${TMPDIR:-/tmp}/readme.$$" || { rm -f "${TMPDIR:-/tmp}/readme.$$"; echo 'README.md was not in step with nbs/index.ipynb; it has been made again: commit it.'; exit 1; }
rm -f "${TMPDIR:-/tmp}/readme.$$"

# many tests wait for processes: three at a time keep two cores busy
step 'pytest'
timeout 900 python -m pytest -n "${TEST_WORKERS:-3}" --dist loadfile --cov --cov-report=term -q --durations=8

printf '\nAll checks passed in %s s.\n' "$(($(date +%s) - begin))"
