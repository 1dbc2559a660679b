# Everything a fresh machine needs: make demo, make demo-cpp, make test, make test-all. Only sh, make and Python 3.10-3.13.

PYTHON ?= python3
BIN := .venv/bin
# Two workers; one that is done takes over tests of the other.
PYTEST := $(BIN)/pytest -n 2 --dist worksteal

.PHONY: install demo demo-cpp test test-all lint clean

install: .venv/installed

# The CPU build of torch is enough: an export needs no GPU.
.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 10) <= v[:2] <= (3, 13) else "Python %d.%d found; 3.10 to 3.13 is needed: make PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps axolotl==0.19.0  # it pins versions that exclude ours; its plugins need none
	touch $@

# Export the bundled model at 4 bits, verify it, measure it.
demo: install
	$(BIN)/llm-coreml export llama --bits 4 --output out/demo --overwrite
	$(BIN)/llm-coreml eval out/demo --tokens 4096

# The bundled model's twin for XNNPACK, by the runner in C++, which is configured and built first.
demo-cpp: install
	$(BIN)/llm-coreml export llama --bits 4 --backend xnnpack --output out/twin --overwrite
	$(BIN)/llm-coreml generate out/twin --runtime cpp --prompt "The with statement is used to" --max-new-tokens 24

# Every feature once. What is left out are further cases of the same.
test: install
	$(PYTEST) -m "not exhaustive"

test-all: install
	$(PYTEST)

# Types are checked as they are installed, without what an earlier build has left.
lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build
	$(BIN)/python -m pip install --quiet --no-deps --target build/typed .
	cd build/typed && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p llm_coreml

clean:
	rm -rf .venv build out dist *.egg-info
