# Everything runs in .venv, which the first target that needs it creates from requirements.lock.
PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Runs the GPU kernels' tests on a CPU, in Triton's interpreter (3.6's fails with numpy 2.4). Not in the lock: a CUDA
# build of torch brings the Triton that it pins, and a second pin could not be resolved (docs/decisions.md).
TRITON := triton==3.9.0; sys_platform == "linux" and platform_machine == "x86_64"
# Tests run with one thread each (tests/conftest.py), JOBS of them at a time.
PYTEST := $(BIN)/python -m pytest
REQUIRE_311 := -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else \
	"titans needs Python 3.11 or newer; %s is %d.%d. Name another with: make PYTHON=python3.12 ..." % (sys.executable, v[0], v[1]))'

.PHONY: help setup demo test test-slow test-gpu check format bench lock clean

help:
	@echo "make demo       a fact hidden in a long text, found by a small trained memory (two minutes on 2 cores)"
	@echo "make test       the tests, without those marked slow or gpu"
	@echo "make test-slow  the slow ones        make test-gpu  those that need a CUDA device"
	@echo "make check      format, lint, types  make format    mend the first two"
	@echo "make bench      every benchmark      make lock      resolve requirements.lock anew"

setup: $(READY)

$(READY): requirements.lock pyproject.toml Makefile
	@test -x $(BIN)/python || $(PYTHON) $(REQUIRE_311)
	@test -x $(BIN)/python || { echo "set-up: creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@$(BIN)/python $(REQUIRE_311)
	@echo "set-up: installing requirements.lock into $(VENV) (minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	@$(BIN)/python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("triton") is None)' \
		|| $(BIN)/python -m pip install --quiet --disable-pip-version-check '$(TRITON)'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(READY)
	$(BIN)/titans demo

test: $(READY)
	$(PYTEST) -n $(JOBS) -m "not slow and not gpu"

test-slow: $(READY)
	$(PYTEST) -n $(JOBS) -m "slow and not gpu"

test-gpu: $(READY)
	$(PYTEST) -n $(JOBS) -m gpu

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The peer is not in the lock: only benchmarks need it. One process at a time, so that none disturbs another's timing.
bench: $(READY)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock \
		--no-build-isolation --editable '.[benchmark]'
	@set -e; for file in benchmarks/bench_*.py; do echo "== $$file"; $(BIN)/python $$file; done
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; \
		then $(BIN)/titans bench ops && $(BIN)/titans bench models; \
		else echo "== titans bench ops, models: left out, they need a CUDA device"; fi
	$(BIN)/python benchmarks/report.py

lock:
	$(PYTHON) tools/lock.py

clean:
	rm -rf $(VENV) build dist
