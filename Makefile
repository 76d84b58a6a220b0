# Thin on purpose: every target is one or two commands that a person could type.

ifeq ($(OS),Windows_NT)
BIN := .venv/Scripts
else
BIN := .venv/bin
endif
PYTHON ?= python3
INSTALLED := .venv/.installed
DEVELOPER := .venv/.installed-dev

.PHONY: setup run test test-slow exercises bench bench-server lab ui server lint lock clean

setup: $(INSTALLED)

run: $(INSTALLED)
	$(BIN)/python -m demo_lib run

test: $(DEVELOPER)
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow"

test-slow: $(DEVELOPER)
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m slow

bench: $(DEVELOPER)
	$(BIN)/python -m tests.benchmarks.bench

bench-server: $(DEVELOPER)
	$(BIN)/python -m tests.benchmarks.bench_server

lab: $(INSTALLED)
	$(BIN)/python -m jupyter lab --ServerApp.root_dir=. notebooks/00_start_here.ipynb

ui: $(INSTALLED)
	$(BIN)/python -m demo_lib ui

server: $(INSTALLED)
	$(BIN)/python -m server start

lint: $(DEVELOPER)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

exercises: $(DEVELOPER)
	$(BIN)/python -m tests.tools.make_exercises

lock: $(DEVELOPER)
	$(BIN)/python -m tests.tools.lock

clean:
	git clean -idX

$(INSTALLED): install.py pyproject.toml constraints.txt
	$(PYTHON) install.py

$(DEVELOPER): $(INSTALLED)
	$(PYTHON) install.py --dev
