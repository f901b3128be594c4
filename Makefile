# `make demo` and `make test` need nothing but Python 3.10 or later and make: each makes its own .venv first.
PYTHON ?= python3
BIN := .venv/bin
OLDEST := .venv-oldest/bin
# A machine without a GPU takes one pinned build of torch; a machine with one takes the newest for it.
TORCH ?= $(if $(shell command -v nvidia-smi 2>/dev/null),torch>=2.10,torch==2.13.0)
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
SIDE_BY_SIDE := -n $(JOBS) --dist worksteal

.PHONY: demo test test-thorough test-families test-oldest models lint bench format clean

demo: .venv/.installed
	$(BIN)/expertune train

# a worker a core
test test-thorough test-families test-oldest: export OMP_NUM_THREADS = 1
test: .venv/.installed
	$(BIN)/pytest $(SIDE_BY_SIDE) -m "not thorough"
	TRITON_INTERPRET=1 $(BIN)/pytest $(SIDE_BY_SIDE) -m "not thorough" -k "kernels or triton" --ignore=tests/kernels/tuning/test_cache.py tests/kernels tests/test_experts.py tests/test_accumulate.py tests/backends tests/test_saved_bytes.py tests/graphs/test_postponed.py

# the many alike that `make test` leaves out, before a release
test-thorough: .venv/.installed
	$(BIN)/pytest $(SIDE_BY_SIDE) -m thorough
	TRITON_INTERPRET=1 $(BIN)/pytest $(SIDE_BY_SIDE) -m thorough -k "kernels or triton" tests/kernels tests/test_experts.py tests/test_accumulate.py tests/backends tests/test_saved_bytes.py

test-families: .venv/.installed
	$(BIN)/pytest $(SIDE_BY_SIDE) tests/families

# on the oldest Transformers, PEFT and TRL: all but what does not know them, what starts processes, what compiles, what
# each family's recorded layers replay, and what these cannot do themselves (preferences: a second adapter of experts)
LEFT_OUT := attention backends benchmarks cli examples families/test_real_sizes.py graphs hosts/test_compile.py \
	hosts/test_ddp.py hosts/test_preferences.py kernels loss memory/test_token_tiles.py optim test_accumulate.py \
	test_activations.py test_experts.py test_gated_mlp.py test_import_orders.py test_routing.py test_saved_bytes.py \
	test_size.py training/demo training/test_metrics.py training/test_out_of_memory.py
test-oldest: .venv-oldest/.installed
	$(OLDEST)/pytest $(SIDE_BY_SIDE) -m "not thorough" -k "not compiled and not replayed" $(addprefix --ignore=tests/,$(LEFT_OUT))

models: .venv/.installed
	$(BIN)/python -m tests.families.table

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.installed
	$(BIN)/python benchmarks/moe_block.py
	$(BIN)/python benchmarks/sft_step.py

clean:
	rm -rf .venv .venv-oldest runs build dist

.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[train,dev]"
	touch $@

.venv-oldest/.installed: pyproject.toml tests/oldest.txt
	$(PYTHON) -m venv .venv-oldest
	$(OLDEST)/python -m pip install --quiet --upgrade "pip>=24"
	$(OLDEST)/python -m pip install --quiet "$(TORCH)"
	$(OLDEST)/python -m pip install --quiet --constraint tests/oldest.txt --editable ".[train,dev]"
	touch $@
