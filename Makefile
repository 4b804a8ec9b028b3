# Needs python3 (3.11 or newer for the pinned versions) and a package index; nothing else.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin

# keeps the checkout off sys.path, where transformers takes kernels/ for the PyPI package "kernels"
export PYTHONSAFEPATH := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# no byte code for what is never imported: that is most of torch and transformers
INSTALL := $(BIN)/pip install --quiet --no-compile -c constraints.txt

.PHONY: help demo smoke test test-slow lint type docs bench gpu-check gpu-pack test-oldest clean
.DELETE_ON_ERROR:

help:
	@echo "make demo       compile the embedded model, draw grounded images into demo/"
	@echo "make smoke      a few tests in about a minute: schedule, losses, a build, a command"
	@echo "make test       the quick tests; make test-slow: the others that need no GPU"
	@echo "make lint type  ruff, mypy"
	@echo "make docs       tables of docs/performance.md, docs/cli.md, API reference into build/docs"
	@echo "make bench      speed beside a plain diffusers loop, and of training, into bench-results/"
	@echo "make gpu-check  check and time everything on an NVIDIA GPU in 8 minutes, into gpu-check.json"
	@echo "make gpu-pack   wheels for a GPU machine without a network: INSTALLED=its pip list (docs/gpu.md)"
	@echo "make test-oldest  kernels and pipeline with the oldest versions (torch with CUDA is 5 GB)"
	@echo "make clean      remove what these made, but not $(VENV)"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# A stamp is written after a whole install only, so an interrupted one is taken up again.
# The demo takes the small extra: openvino (a large wheel) is of no use to it.
$(VENV)/.installed-demo: setup.py constraints.txt | $(BIN)/python
	@echo "installing hcma-fast into $(VENV) (a minute or two) ..." >&2
	$(INSTALL) -e ".[onnxruntime]"
	@touch $@

$(VENV)/.installed-dev: setup.py constraints.txt | $(BIN)/python
	@echo "installing hcma-fast and its tools into $(VENV) (a minute or two) ..." >&2
	$(INSTALL) -e ".[cpu,dev]"
	@touch $@

demo: $(VENV)/.installed-demo
	$(BIN)/hcma-fast build --model tiny --backend onnxruntime
	$(BIN)/hcma-fast generate --model tiny --backend onnxruntime --input docs/demo.jsonl --seed 0 \
		--overlay --out demo --force

# The files by name, so that pytest does not read all others: the marker alone would.
SMOKE := tests/test_schedule.py tests/test_losses.py tests/sampling/test_solvers.py tests/test_readme.py \
	tests/export/test_build.py tests/runtime/test_pipeline.py
smoke: $(VENV)/.installed-dev
	OMP_NUM_THREADS=$(WORKERS) $(BIN)/python -m pytest -m smoke $(SMOKE)

# One thread a worker: two workers with two threads each would fight for two cores. The order of
# files is that of tests/conftest.py, longest first; xdist's own puts those with the fewest tests last.
test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile \
		--no-loadscope-reorder --max-worker-restart 0 --durations 25

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "slow and not gpu" --timeout 3600

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy knows nothing of package_dir: give it the tree that an installed hcma_fast has
TYPES := build/types
type: $(VENV)/.installed-dev
	@rm -rf $(TYPES) && mkdir -p $(TYPES)/hcma_fast
	@ln -s $(CURDIR)/hcma_fast/* $(addprefix $(CURDIR)/,kernels export train bench) $(TYPES)/hcma_fast
	MYPYPATH=$(TYPES) $(BIN)/mypy -p hcma_fast

# pdoc finds sub-packages by folder, and these lie beside hcma_fast
docs: $(VENV)/.installed-dev
	@mkdir -p build
	$(BIN)/python -m hcma_fast.bench.speed.tables docs/results docs/performance.md
	$(BIN)/python -m hcma_fast.cli.reference > build/cli.md && mv build/cli.md docs/cli.md
	$(BIN)/python -m pdoc --docformat google --output-directory build/docs hcma_fast \
		$(addprefix hcma_fast.,kernels export train bench)

bench: $(VENV)/.installed-dev
	$(BIN)/hcma-fast bench run peers train --out bench-results
	$(BIN)/hcma-fast bench run train --model sd14 --rounds 1 --out bench-results/sd14

# It takes the environment as it is: on a GPU machine that is an image's, or one with the extra gpu.
GPU_PYTHON ?= $(firstword $(wildcard $(BIN)/python) python3)
gpu-check:
	$(GPU_PYTHON) -m hcma_fast.bench.gpu_check --out gpu-check.json

# INSTALLED: what `python3 -m pip list --format=freeze` says on the GPU machine
gpu-pack: $(VENV)/.installed-dev
	$(BIN)/python -m hcma_fast.bench.gpu_check.pack --installed $(INSTALLED) --out build/gpu-check

OLDEST := .venv-oldest
$(OLDEST)/.installed: setup.py constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet --no-compile -c constraints-oldest.txt -e ".[onnxruntime]" \
		triton "pytest>=9,<10" "pytest-timeout>=2.4,<3" "hypothesis>=6.130,<7"
	@touch $@

test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest tests/kernels tests/sampling/test_loop.py \
		tests/runtime/test_pipeline.py tests/export/test_build.py

clean:
	rm -rf build dist demo bench-results *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find hcma_fast kernels export train bench tests -name __pycache__ -type d -prune -exec rm -rf {} +
