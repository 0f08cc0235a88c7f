# One command each: `make demo` shows what this is, `make test` shows that it works.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo demo-preference test test-all test-newest test-gpu fuzz docs lint check clean

# Everything is installed into .venv, in the versions of constraints.txt, which are those that are tested.
setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	@# torch for CUDA brings the Triton that it needs; on a CPU Triton's interpreter tests the kernels
	$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check triton==3.9.0
	touch $@

demo: setup
	$(BIN)/python scripts/demo.py

demo-preference: setup
	$(BIN)/python scripts/demo_preference.py

# Without the tests marked slow, in two processes.
test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not gpu"

test-all: setup
	$(BIN)/python -m pytest -m "not gpu"

# Before a release: in the newest version of everything, as pip installs it without constraints.txt.
test-newest:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade \
		--upgrade-strategy eager -e ".[test]"
	.venv-newest/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not gpu"

# On a machine with a CUDA device.
test-gpu: setup
	$(BIN)/python -m pytest -m gpu

# Thousands of broken inputs; another SEED tries others.
fuzz: setup
	LIT_QLORA_FUZZ_EXAMPLES=2000 LIT_QLORA_FUZZ_SEED=$(or $(SEED),1) $(BIN)/python -m pytest -s tests/fuzz -m slow

# The site of docs/ in out/site; a link or an anchor that leads nowhere is an error.
docs: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test

clean:
	rm -rf .venv .venv-newest out .pytest_cache .mypy_cache .ruff_cache *.egg-info
