# make demo   train a tiny DeepSeek-V3 in BF16 and in FP8 on the text in this repository, and compare the two
# make test   lint, types, import contracts and the CPU tests
# make test-long   the slower proofs: FP8 against BF16 over whole runs, every command of the documents, ...
# make endurance   half an hour or so: 30 faults strike one training, which must end equal to an unbroken one
# make check  the first three of these only
# make fuzz   300 random layouts against one process; ARGS="--defects": planted mistakes, each until it is found
# make fuzz-files   20,000 damaged files against every reader: one sentence or a right answer
# make gpu    on a machine with a GPU: its tests, short training runs, benches, and one report in runs/gpu
# make clean  remove caches (never runs/ nor stores/)
# A fresh machine needs Python 3.11 to 3.13 and nothing else: .ci/setup makes .venv. PYTHON=... names another Python.

BIN := .venv/bin
WORKERS ?= 2
# More arguments for pytest or for the demo, e.g. make test ARGS="-k router".
ARGS ?=
START := $(shell date +%s)
export PYTHON
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=10
# make gpu needs torch, Triton, PyYAML, numpy and safetensors only: another Python serves as well, GPU_PYTHON=python3.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)

.PHONY: demo test test-long endurance check fuzz fuzz-files gpu clean setup setup-dev

demo: setup
	@$(BIN)/python launch/demo.py $(ARGS)
	@echo "make demo: $$(( $$(date +%s) - $(START) )) s"

test: check
	@$(PYTEST) -m "not long" $(ARGS)
	@echo "make test: $$(( $$(date +%s) - $(START) )) s"

test-long: setup-dev
	@$(PYTEST) -m long $(ARGS)
	@echo "make test-long: $$(( $$(date +%s) - $(START) )) s"

endurance: setup-dev
	@$(BIN)/python -m tests.endurance $(ARGS)
	@echo "make endurance: $$(( $$(date +%s) - $(START) )) s"

check: setup-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

fuzz: setup-dev
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz_layouts $(ARGS)

fuzz-files: setup-dev
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz_files $(ARGS)

gpu:
	@$(GPU_PYTHON) -m launch.gpu $(ARGS)
	@echo "make gpu: $$(( $$(date +%s) - $(START) )) s"

clean:
	@rm -rf .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache build dist ./*.egg-info
	@find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

setup:
	@.ci/setup run

setup-dev:
	@.ci/setup dev
