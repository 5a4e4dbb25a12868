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

step 'notebooks, with types and the docs site beside them'
said=$(mktemp -d)
cp README.md "$said/README.md"
mypy > "$said/mypy" 2>&1 & types=$!
python tools/build_docs.py --engine sphinx > "$said/docs" 2>&1 & site=$!
timeout 600 python tools/run_notebooks.py --workers "${WORKERS:-2}" --budget "${NOTEBOOK_BUDGET:-400}"
wait "$types" || { cat "$said/mypy"; exit 1; }
tail -1 "$said/mypy"
wait "$site" || { cat "$said/docs"; exit 1; }
tail -2 "$said/docs"
cmp -s README.md "$said/README.md" || { echo 'README.md was not in step with nbs/index.ipynb; it has been made again: commit it.'; exit 1; }
rm -rf "$said"

# many tests wait for processes: three at a time keep two cores busy
step 'pytest'
timeout 900 python -m pytest -n "${TEST_WORKERS:-3}" --dist loadfile --cov --cov-report=term -q --durations=8

printf '\nAll checks passed in %s s.\n' "$(($(date +%s) - begin))"
