# Everything a fresh machine needs is Python 3.11 or newer and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet

.PHONY: install demo test pytest test-multinode lint proto docs bench clean

install: $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/cqil demo

# Side by side: the types take half a minute.
test: $(READY)
	$(MAKE) --jobs=2 lint pytest

pytest: $(READY)
	$(BIN)/python -m pytest

# The part of the tests that runs over several hosts; needs root, sshd and rsync.
test-multinode: $(READY)
	$(BIN)/python -m pytest tests/multinode

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python bench/exchange.py
	$(BIN)/cqil bench latency

# Generated code is checked in; a test fails when it is stale.
proto: $(READY)
	$(BIN)/python -m grpc_tools.protoc -I protos --python_out=. --pyi_out=. --grpc_python_out=. \
		protos/cqil_dist/rpc/v1/generation.proto

# The tables of options come from the code; a test fails when they are stale.
docs: $(READY)
	$(BIN)/python -m cqil_dist.cli.option_tables docs/*.md

# torch by version: a machine that has that build at hand takes it, others the registry's.
$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name it with make PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[runtime]'
	touch $@

$(READY): $(INSTALLED)
	$(PIP) --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
