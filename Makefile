# Every target sets up what it needs: a virtual environment in .venv with the pinned requirements.
PYTHON ?= python3.11
BIN := .venv/bin
RUN := .venv/run.installed
DEV := .venv/dev.installed
# RUN_DIR, or the folder that was written to last.
LATEST = $(or $(RUN_DIR),$(shell ls -td runs/*/metrics.jsonl 2> /dev/null | head -n 1 | xargs -r dirname),\
	$(error RUN_DIR: there is no run in runs/ yet; `make demo` makes one))

.PHONY: help demo audit submission sweep-demo report systems study data test stress lint format docs bench clean

##@ A run

help:  ## this list
	@awk -F ':.*## ' '/^##@ /{print "\n" substr($$0, 5)} /^[a-z-]+:.*## /{printf "  %-12s%s\n", $$1, $$2}' Makefile

demo: $(RUN) data/demo/manifest.json  ## train, quantise, score, adapt and audit on demo data (5 minutes)
	@# Exit code 3: over the contest's 600 s, on a slow machine; the audit says so, and judges all else.
	PRESET=demo $(BIN)/python train_gpt.py || test $$? -eq 3
	@# The page needs matplotlib, which only `make report` installs. Whatever comes of it, the audit's exit code counts.
	@run="$$(ls -td "$${ARTIFACT_DIR:-runs/}"*/ | head -n 1)"; $(BIN)/python tools/audit.py "$$run"; code=$$?; \
	if $(BIN)/python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("matplotlib") is None)'; \
	then $(BIN)/python tools/report.py "$$run"; \
	else echo "make report RUN_DIR=$$run: a page about it (installs matplotlib)"; fi; exit $$code

audit: $(RUN)  ## judge a finished run: RUN_DIR=runs/NAME, else the latest
	$(BIN)/python tools/audit.py "$(strip $(LATEST))"

report: $(DEV)  ## a page about RUN_DIR="runs/A runs/B", else about the latest run
	$(BIN)/python tools/report.py $(LATEST)

##@ Studies

submission: $(DEV) data/demo/manifest.json  ## three demo seeds, audited, into logs/, submission.json and README
	$(BIN)/python tools/reproduce.py --preset demo --seeds 42,314,1234 --audit --submission -- $(BIN)/python train_gpt.py

sweep-demo: $(DEV) data/demo/manifest.json  ## a search over two settings in 8 short demo runs (4 minutes)
	PRESET=demo ITERATIONS=16 VAL_LOSS_EVERY=8 PREQUANT_ONLY=1 $(BIN)/python tools/sweep.py --study sweep-demo --prune \
		--set MATRIX_LR=log:0.01:0.06 --set TIED_EMBED_LR=log:0.01:0.1 --trials 8 --seed 1 --json

systems: $(DEV) data/demo/manifest.json data/demo_plain/manifest.json  ## every published system at demo scale, audited (20 minutes)
	$(BIN)/python tools/all_systems.py

study: $(DEV) data/study_demo/confirm2/manifest.json  ## one idea against the record, in pairs (under 5 minutes)
	SCALE=demo ITERATIONS=24 PREQUANT_ONLY=1 OMP_NUM_THREADS=1 $(BIN)/python tools/study.py --study make-study \
		--arms "four momenta" --seeds 2 --jobs 2 --data data/study_demo

data/study_demo/confirm2/manifest.json: $(wildcard dataprep/*.py dataprep/*.c) dataprep/demo.jsonl.xz | $(RUN)
	SCALE=demo $(BIN)/python tools/study.py --prepare --docs dataprep/demo.jsonl.xz --data data/study_demo \
		--split 40 --scored 40 --stream 100 --streams 2

bench: $(RUN)  ## speed of a training step on this machine (small on a CPU)
	$(BIN)/python bench/train_step.py

##@ Data

data: data/demo/manifest.json data/demo_plain/manifest.json  ## the demo data sets alone, CaseOps and plain

data/demo/manifest.json: prepare_caseops_data.py lossless_caps.py $(wildcard dataprep/*.py dataprep/*.c) dataprep/demo.jsonl.xz | $(RUN)
	$(BIN)/python prepare_caseops_data.py --demo --overwrite

data/demo_plain/manifest.json: prepare_caseops_data.py lossless_caps.py $(wildcard dataprep/*.py dataprep/*.c) dataprep/demo.jsonl.xz | $(RUN)
	$(BIN)/python prepare_caseops_data.py --demo --plain --overwrite

##@ Work on the code

test: $(DEV)  ## all tests (10 to 15 minutes on 2 cores)
	$(BIN)/python -m pytest -q -n 2 --durations 5

stress: $(DEV)  ## fuzzers and cheats (an hour); other cases of them: docs/tools.md
	$(BIN)/python -m pytest -q -n 2 --durations 5 tests/stress

lint: $(DEV)  ## style, formatting, spelling, imports, README and docs up to date
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/python tools/imports.py
	$(BIN)/python tools/readme_settings.py --check
	$(BIN)/python tools/reproduce.py --check

format: $(DEV)  ## reformat the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(RUN)  ## regenerate the settings tables of docs/settings.md
	$(BIN)/python tools/readme_settings.py

$(RUN): requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(DEV): requirements-dev.txt $(RUN)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@# Kernels are tested in Triton's interpreter. A CUDA build of torch has brought its own release of it.
	$(BIN)/python -c "import triton" 2> /dev/null || \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check triton==3.6.0
	touch $@

clean:  ## remove environment, demo data and caches; runs/ stays
	rm -rf .venv data/demo data/demo_plain data/study_demo .pytest_cache .ruff_cache .hypothesis __pycache__ */__pycache__ */*/__pycache__
