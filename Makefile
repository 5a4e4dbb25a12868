# Two commands do all the set-up on a fresh machine:
#   make demo              environment, installation, and a voice built, trained and tuned in front of you
#   make test              environment, installation, and every check there is
# Knobs: SEED=3  STUDY=mine  ARGS="--max-trials 4"  PYTHON=python3.12  TORCH="torch==2.9.0"  VENV=.venv

VENV ?= .venv
ENGINES_VENV ?= .venv-engines
SEED ?= 42
STUDY ?= demo
ARGS ?=
export PYTHON TORCH

.DEFAULT_GOAL := help
.PHONY: help demo test test-engines docs env-demo env-test clean-build

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

env-demo:
	@tools/env.sh $(VENV) demo

env-test:
	@tools/env.sh $(VENV) demo,dev,docs

demo: env-demo  ## a voice from nothing: corpus, training, tuning, report
	@$(VENV)/bin/tts-tune run --study $(STUDY) --seed $(SEED) $(ARGS)
	@echo
	@echo "Report:       runs/$(STUDY)/report.html   (open it in a browser)"
	@echo "Best model:   runs/$(STUDY)/best_model.pt"
	@echo "Make it speak: $(VENV)/bin/tts-tune synth \"a new sentence\" --model runs/$(STUDY)/best_model.pt -o out.wav"

test: env-test  ## every check: export in step, notebooks, lint, types, docs, pytest
	@PATH="$(abspath $(VENV))/bin:$$PATH" tools/check.sh

test-engines:  ## extras in an environment of their own: Hyperopt, Ray's searchers, trainers on a Ray cluster
	@tools/env.sh $(ENGINES_VENV) dev,hyperopt,ray
	@TTS_TUNER_ENGINES=1 OMP_NUM_THREADS=1 MPLBACKEND=agg $(ENGINES_VENV)/bin/python -m pytest -q --durations=5 tests/test_extra_engines.py

docs: env-test  ## the site, into docs/
	@PATH="$(abspath $(VENV))/bin:$$PATH" python tools/build_docs.py
	@echo "Open docs/index.html"

clean-build:  ## remove what builds made; runs, data and the environment stay
	rm -rf _proc docs build dist *.egg-info jupyter_execute .pytest_cache .mypy_cache .ruff_cache .coverage .coverage.*
