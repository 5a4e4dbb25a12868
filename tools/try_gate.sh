#!/bin/sh
# Does the gate close? Breaks a scratch clone in three ways, one after the other, and expects the step that guards it to fail each time.
#   tools/try_gate.sh            with the environment's bin/ on the PATH
# Each step runs as tools/check.sh runs it; the whole gate would only repeat the steps that cannot see the break.
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
git clone -q "$here" "$scratch/clone"
cd "$scratch/clone"
export PYTHONPATH="$scratch/clone" OMP_NUM_THREADS=1 MPLBACKEND=agg
bad=0

expect() {  # expect pass|fail WORDS COMMAND...
    want=$1 what=$2; shift 2
    if "$@" >"$scratch/log" 2>&1; then got=pass; else got=fail; fi
    if [ "$got" = "$want" ]; then echo "as it should: $what: $got"; else bad=1; echo "WRONG: $what: $got, expected $want"; tail -5 "$scratch/log"; fi
}
edit() {  # edit FILE OLD NEW, once, literally
    python - "$@" <<'P'
import sys
from pathlib import Path
path, old, new = sys.argv[1:]
text = Path(path).read_text()
assert old in text, f'{old!r} is not in {path}'
Path(path).write_text(text.replace(old, new, 1))
P
}
nb=nbs/config/01_errors.ipynb
run_one() { python tools/run_notebooks.py --workers 1 --only "$nb"; }

expect pass 'untouched clone: modules in step' python tools/in_step.py
expect pass 'untouched clone: a notebook' run_one
expect pass 'untouched clone: a test' python -m pytest -q -p no:cacheprovider tests/test_metadata.py

edit "$nb" 'exit_code = 2' 'exit_code = 3'
expect fail 'an exported cell changed without export' python tools/in_step.py
git checkout -q -- .

edit "$nb" "== ''" "== 'never'"
expect pass 'a broken assertion leaves modules in step' python tools/in_step.py
expect fail 'a notebook assertion broken' run_one
git checkout -q -- .

edit tests/test_metadata.py "== tts_tuner.__name__" "== 'another'"
expect fail 'a test broken' python -m pytest -q -p no:cacheprovider tests/test_metadata.py
git checkout -q -- .

test -z "$(git status --porcelain)" || { bad=1; echo 'WRONG: the steps left changes in the clone'; git status --short; }
exit $bad
