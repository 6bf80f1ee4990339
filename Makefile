# Each target does the set-up it needs; a second `make` finds nothing to do.

PYTHON ?= python3.11
PORT ?= 8000
BIN := .venv/bin
PY := $(BIN)/python
# Files of tests side by side; a file's tests share what they have trained or started.
ABREAST = --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
NOTEBOOKS = $(wildcard notebooks/*.ipynb)
LOCK = $(BIN)/uv pip compile pyproject.toml --quiet --generate-hashes --no-header --no-emit-index-url \
  --python-version 3.11 --python-platform x86_64-unknown-linux-gnu

.DEFAULT_GOAL := help
.PHONY: help demo lab serve check format test test-fast notebooks bench images lock train clean system

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/.installed system ## From a prompt to the promoted, served image; leaves runs/demo/
	$(PY) demo.py

lab: .venv/.installed system ## JupyterLab on the notebooks
	$(PY) -m jupyterlab --ServerApp.root_dir=. $(if $(filter 0,$(shell id -u)),--allow-root) notebooks/01_explore.ipynb

serve: .venv/.installed system ## The service, on http://127.0.0.1:8000 (PORT=8000)
	$(PY) -m service --port $(PORT)

check: .venv/.installed system ## Style, types, direction of imports, notebooks without outputs
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(BIN)/lint-imports --no-cache
	$(if $(NOTEBOOKS),$(PY) -m nbstripout --verify $(NOTEBOOKS))

format: .venv/.installed ## Put style and notebooks in the form that `check` asks for
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .
	$(if $(NOTEBOOKS),$(PY) -m nbstripout $(NOTEBOOKS))

test: .venv/.installed system ## All tests
	$(PY) -m pytest $(ABREAST)

test-fast: .venv/.installed system ## The tests that take no more than a few seconds each
	$(PY) -m pytest $(ABREAST) -m "not slow"

notebooks: .venv/.installed system ## Every notebook to its end; the executed copies are kept in runs/notebooks/
	set -e; for notebook in $(NOTEBOOKS); do $(PY) -m sdxl_lab notebook $$notebook; done

bench: .venv/.installed system ## Benchmarks
	$(PY) -m bench

images: .venv/.installed system ## The documentation's images, tables and graphs again; an hour on two cores
	$(PY) -m docs.generated
	$(PY) docs/screenshot.py
	SDXL_SCREENSHOT=docs/explore.png $(PY) -m pytest tests/browser/test_jupyterlab.py -k looks
	$(PY) -m recipes.nano.evaluate --guidance-scale 3
	cp runs/nano/evaluation/cats.png docs/
	$(PY) -m sdxl_lab sweep studies/nano_confirm.toml
	$(PY) -m sdxl_lab sweep studies/nano_final.toml
	$(PY) -m sdxl_lab sweep studies/nano_lora.toml
	$(PY) -m studies.nano_report

lock: .venv/.installed ## locks/ anew from pyproject.toml, with the hash of every package
	$(LOCK) --extra service --output-file locks/service.lock
	$(LOCK) --extra service --extra lab --output-file locks/lab.lock

train: .venv/.installed system ## Train nano, the miniature SDXL, from scratch; resumes
	$(PY) -m recipes.nano

clean: ## Remove .venv and caches; never runs/ or images/
	rm -rf .venv .cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.installed: pyproject.toml
	@command -v $(PYTHON) > /dev/null || { echo "$(PYTHON) is missing. Install Python 3.11, or name yours: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@echo "Installing Python packages into .venv (once; some minutes)"
	@$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[service,lab,dev]'
	@touch $@

# OpenCV, which watermarks images, needs libGL and GLib; the browser tests need Chromium, those of replicas nginx.
system:
	@lacking=; \
	if [ "$$(uname -s)" = Linux ]; then \
	  libraries=$$(PATH=$$PATH:/sbin:/usr/sbin ldconfig -p); \
	  case $$libraries in *libGL.so.1*) ;; *) lacking="$$lacking libgl1";; esac; \
	  case $$libraries in *libgthread-2.0.so.0*) ;; *) lacking="$$lacking libglib2.0-0";; esac; \
	fi; \
	command -v chromium > /dev/null || command -v chromium-browser > /dev/null || command -v google-chrome > /dev/null \
	  || lacking="$$lacking chromium"; \
	command -v nginx > /dev/null || [ -x /usr/sbin/nginx ] || lacking="$$lacking nginx"; \
	[ -n "$$lacking" ] || exit 0; \
	if [ "$$(id -u)" = 0 ] && [ -e /etc/debian_version ]; then \
	  echo "Installing system packages:$$lacking"; \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$lacking; } > /dev/null && exit 0; \
	fi; \
	echo "Missing system packages:$$lacking. On Debian or Ubuntu: sudo apt-get install$$lacking;" \
	  "elsewhere take the packages that hold libGL.so.1, libgthread-2.0.so.0, Chromium and nginx." \
	  "Going on: watermarks or browser tests may fail." >&2
