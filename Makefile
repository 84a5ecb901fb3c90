# Everything a developer runs. `make` alone says what there is.
#
#   make test VENV=/path/to/venv     use (or create) a virtual environment elsewhere
#   make demo PROCESSES=2 STEPS=10   a smaller demo

VENV ?= .venv
PYTHON ?= python3
PROCESSES ?= 4
STEPS ?= 30
TARGET ?= graph
SECONDS ?= 600

venv := $(abspath $(VENV))
bin := $(venv)/bin
stamps := target/stamps
# One stamp for each environment, so that changing VENV never meets a stale one.
tools := $(stamps)/tools$(subst /,_,$(venv))
wheel := $(stamps)/wheel$(subst /,_,$(venv))
rust_sources := Cargo.toml $(wildcard Cargo.lock) $(shell find crates -name '*.rs' -o -name Cargo.toml)

# This checkout's package, whichever one the environment was installed from.
export PYTHONPATH := $(CURDIR)/python
export VIRTUAL_ENV := $(venv)
export PATH := $(bin):$(PATH)
unexport CONDA_PREFIX

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-all lint stubtest bench build fuzz fuzz-seeds clean \
	lint-rust lint-python test-rust test-python

help: ## say what the targets are
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

demo: build ## train a small GPT over 4 processes beside one plain PyTorch process
	OMP_NUM_THREADS=1 $(bin)/torchrun --nproc-per-node $(PROCESSES) examples/train_gpt.py \
		--steps $(STEPS) --reference

test: lint test-rust test-python ## check everything but the slow tests

test-slow: build ## run the slow tests, and every example as its docstring says
	$(bin)/python -m pytest -m slow

test-all: test test-slow ## check everything

lint: lint-rust lint-python ## check form, lints and types

lint-rust:
	cargo fmt --all --check
	cargo fmt --manifest-path fuzz/Cargo.toml --check
	cargo clippy --workspace --all-targets --all-features --quiet -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --quiet

lint-python: build
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy

test-rust:
	if cargo nextest --version >/dev/null 2>&1; \
	then cargo nextest run --workspace --all-features --no-tests=pass; \
	else cargo test --workspace --all-features --all-targets; fi
	cargo test --workspace --all-features --doc --quiet

test-python: build
	$(bin)/python -m pytest -m "not slow" -n 2 tests/null
	$(bin)/python -m pytest -m "not slow" --ignore tests/null

stubtest: build ## check that _core.pyi says what the core has
	$(bin)/python -m mypy.stubtest pyrannc._core

bench: ## measure the planner
	cargo bench --workspace

fuzz: ## change files of the form TARGET for SECONDS (needs nightly Rust and cargo-fuzz)
	@mkdir -p fuzz/work/$(TARGET)
	cd fuzz && cargo +nightly fuzz run -s none $(TARGET) work/$(TARGET) corpus/$(TARGET) -- \
		-dict=files.dict -max_total_time=$(SECONDS) -timeout=10 -rss_limit_mb=1024 -max_len=8192

fuzz-seeds: ## write valid files for the fuzzer to start from
	cd fuzz && cargo run --quiet --example seeds

build: $(wheel) ## install the package, with what it needs, into VENV

$(wheel): $(tools) $(rust_sources)
	@echo "installing pyrannc and what it needs into $(venv); torch takes minutes the first time"
	PIP_QUIET=1 PIP_DISABLE_PIP_VERSION_CHECK=1 $(bin)/maturin develop --release --generate-stubs --extras test
	@touch $@

$(tools): pyproject.toml
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or later is needed")'
	test -x $(bin)/python || $(PYTHON) -m venv $(venv)
	$(bin)/python -m pip install --quiet --disable-pip-version-check "maturin>=1.16,<2"
	@mkdir -p $(stamps)
	@touch $@

clean: ## remove what was built; VENV only when it is .venv
	cargo clean
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache dist
	find python -name '*.so' -delete
	find python tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
