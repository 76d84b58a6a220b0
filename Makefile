# Thin on purpose: every target is one or two commands that a person could type.

ifeq ($(OS),Windows_NT)
BIN := .venv/Scripts
else
BIN := .venv/bin
endif
PYTHON ?= python3
INSTALLED := .venv/.installed

.PHONY: run test bench bench-server lab ui server lint lock clean

run: $(INSTALLED)
	$(BIN)/python -m demo_lib run

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadgroup

bench: $(INSTALLED)
	$(BIN)/python -m tests.benchmarks.bench

bench-server: $(INSTALLED)
	$(BIN)/python -m tests.benchmarks.bench_server

lab: $(INSTALLED)
	$(BIN)/python -m jupyter lab --ServerApp.root_dir=. notebooks/00_start_here.ipynb

ui: $(INSTALLED)
	$(BIN)/python -m demo_lib ui

server: $(INSTALLED)
	$(BIN)/python -m server start

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

lock: $(INSTALLED)
	$(BIN)/uv pip compile -q --universal --upgrade --no-annotate --no-header --no-emit-index-url --extra dev pyproject.toml -o constraints.txt

clean:
	git clean -idX

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q uv
	$(BIN)/uv pip install --python $(BIN)/python --compile-bytecode -e ".[dev]" -c constraints.txt
	$(BIN)/python -c "open('$(INSTALLED)', 'w').close()"
