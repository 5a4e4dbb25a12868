#!/bin/sh
# One environment, made once: tools/env.sh VENV EXTRAS
#   tools/env.sh .venv demo
# Nothing is downloaded again while the requirements stay the same. Knobs, all optional:
#   PYTHON=python3.12      which Python; default: the first of python3, python3.13, 3.12, 3.11 that is 3.11 to 3.13
#   TORCH=torch            which torch; default: torch==2.13.0 on a machine without an NVIDIA GPU, the newest with one
set -eu
cd "$(dirname "$0")/.."
venv=${1:?usage: tools/env.sh VENV EXTRAS} extras=${2:?usage: tools/env.sh VENV EXTRAS}

usable() { "$1" -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; }
find_python() {
    for p in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do usable "$p" && { echo "$p"; return; }; done
    if [ -n "${PYTHON:-}" ]; then echo "PYTHON=$PYTHON is not a Python 3.11, 3.12 or 3.13 with its venv module." >&2
    else echo 'No Python 3.11, 3.12 or 3.13 (with its venv module) was found; install one, or name it: make demo PYTHON=/path/to/python3.' >&2; fi
    exit 2
}

if [ -z "${TORCH:-}" ]; then
    if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then TORCH='torch'; else TORCH='torch==2.13.0'; fi
fi

[ -x "$venv/bin/python" ] || {
    python=$(find_python)
    echo "Making the environment $venv with $("$python" --version)."
    "$python" -m venv "$venv"
}
stamp=$venv/.installed-$(echo "$extras" | tr ',' '-')
want=$( (echo "$TORCH"; grep -E 'requirements|console_scripts|min_python' settings.ini; cat setup.py tools/env.sh) | sha256sum | cut -d' ' -f1)
[ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ] && exit 0

start=$(date +%s)
echo "Installing tts_tuner[$extras] and $TORCH into $venv (once; a few minutes at most)."
# -qq: errors only. --no-compile: pip compiles with one core; below all cores do, and leave the packages' own tests out.
pip() { "$venv/bin/python" -m pip --disable-pip-version-check -qq "$@"; }
install() { pip install --no-compile "$@" || { echo "The installation failed; the lines above say why. Is the package index reachable?" >&2; exit 1; }; }
case "$("$venv/bin/python" -m pip --version)" in 'pip 2'[0-5].*) install --upgrade 'pip>=25.1' ;; esac
install --config-settings editable_mode=compat "$TORCH" -e ".[$extras]"
case ",$extras," in *,dev,*)
    # Speech-quality scores of the tests. pesq comes as source only, so it may not build; the tests that need it skip with this reason.
    pip install --no-compile 'pesq>=0.0.4' >/dev/null 2>&1 || echo 'pesq could not be built here (it needs a C compiler); the tests that use it will skip.' ;;
esac
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$venv/bin/python" -m compileall -qq -j 0 -x '[/\\](tests?|_inductor|debugpy)[/\\]' "$site" || true  # a file that does not compile is one that nobody imports
case ",$extras," in *,dev,*) "$venv/bin/python" -c 'import librosa; librosa.stft, librosa.filters.mel' ;; esac  # numba compiles librosa's loops, once
echo "$want" > "$stamp"
echo "Installed in $(($(date +%s) - start)) s."
