PYTHON ?= python3
BIN := .venv/bin

DIST := dist

.PHONY: demo test test-slow test-wheel lint bench gpu docs wheel clean

demo: .venv/.bench  ## what LLaMA-7B needs, then AdamW against GaLore on real text
	$(BIN)/python -m lowrank_optim memory --model llama-7b --rank 1024 --budget-gib 24
	$(BIN)/python -m benchmarks.demo

test: .venv/.dev  ## the test suite
	$(BIN)/python -m pytest -n auto --dist worksteal

test-slow: .venv/.dev .venv/.release  ## what takes minutes
	$(BIN)/python -m pytest -m slow

test-wheel: .venv/.dev .venv/.release  ## the wheel alone, without a compiler: WHEEL=dist TORCH=2.6.0 PYTHON=python3.13
	WHEEL="$(WHEEL)" TORCH="$(TORCH)" PYTHON="$(PYTHON)" $(BIN)/python -m pytest -m slow tests/docs_and_project/test_wheel.py

lint: .venv/.dev  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --style=file:csrc/.clang-format --dry-run -Werror csrc/*.cpp csrc/*.cu csrc/*.cuh csrc/*.h tests/ops/*.cpp tests/cuda_on_host/*.cpp tests/cuda_on_host/*.h
	$(BIN)/mypy

bench: .venv/.dev  ## the figures of docs/performance.md, side by side
	$(BIN)/python -m benchmarks.step_time
	$(BIN)/python -m benchmarks.refresh
	$(BIN)/python -m benchmarks.kernels

# Without a GPU it says so and fails: a job that was to show something, and showed nothing, must not
# be green. What of it a CPU can run, a CPU runs in `make test-slow`.
gpu: .venv/.dev  ## what only a GPU can show, in runs/gpu/report.md and report.json
	$(BIN)/python -m benchmarks.gpu

docs: .venv/.docs  ## the site, in build/docs; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Undefined GOMP_* resolve to the runtime that torch has loaded. A libgomp in the wheel would be a
# second one, with threads of its own: auditwheel must leave it out, and tests/docs_and_project/test_wheel.py looks.
wheel: .venv/.release  ## dist/: an sdist, and a manylinux wheel made from it
	rm -f $(DIST)/lowrank_optim-*
	$(BIN)/python -m build --outdir $(DIST) .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude 'libgomp*' --wheel-dir $(DIST) $(DIST)/*-linux_*.whl
	rm $(DIST)/*-linux_*.whl

.venv:
	$(PYTHON) -m venv .venv

.venv/.bench: pyproject.toml constraints.txt | .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[bench]'
	touch $@

.venv/.dev: pyproject.toml constraints.txt | .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@ .venv/.bench

.venv/.docs: pyproject.toml constraints.txt | .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	touch $@

# What builds needs no torch: the extra is read, not installed with the package.
.venv/.release: pyproject.toml constraints.txt | .venv
	$(BIN)/python -m pip install -q -c constraints.txt $$($(BIN)/python -c "$$RELEASE")
	touch $@

define RELEASE
import tomllib
with open('pyproject.toml', 'rb') as file:
    extras = tomllib.load(file)['project']['optional-dependencies']
print(*(name.partition(';')[0] for name in extras['release']))
endef
export RELEASE

clean:
	rm -rf .venv runs build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
