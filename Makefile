PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow lint bench docs clean

demo: .venv/.bench  ## what LLaMA-7B needs, then AdamW against GaLore on real text
	$(BIN)/python -m benchmarks.memory --model llama-7b --rank 1024 --budget-gib 24
	$(BIN)/python -m benchmarks.pretrain

test: .venv/.dev  ## the test suite
	$(BIN)/python -m pytest -n auto

test-slow: .venv/.dev  ## what takes minutes
	$(BIN)/python -m pytest -m slow

lint: .venv/.dev  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --style=file:csrc/.clang-format --dry-run -Werror csrc/*.cpp csrc/*.cu csrc/*.cuh csrc/*.h tests/ops/*.cpp
	$(BIN)/mypy

bench: .venv/.dev  ## the figures of docs/performance.md, side by side
	$(BIN)/python -m benchmarks.step_time
	$(BIN)/python -m benchmarks.refresh
	$(BIN)/python -m benchmarks.kernels

docs: .venv/.docs  ## the site, in build/docs; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

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

clean:
	rm -rf .venv runs build .mypy_cache .pytest_cache .ruff_cache .hypothesis
