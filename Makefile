# make demo       translate a real input with the shipped model (no torch needed)
# make test       everything CI runs: lint, types, tests
# make test-fast  the tests of the edit loop: without the slow files that tests/conftest.py lists
# make triton-server  .venv-triton, for the tests that run Triton Inference Server; without it they skip
# Each sets up its own virtual environment; PYTHON chooses the interpreter (3.10 to 3.13).

PYTHON ?= python3
DEMO := .venv-demo
DEV := .venv
TRITON := .venv-triton
PIP := -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
# one single-threaded process a core beats one with many threads; a file's tests stay together and share fixtures, and
# the files start in the order of tests/conftest.py
PYTEST := OMP_NUM_THREADS=1 $(DEV)/bin/python -m pytest \
	--numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-fast lint typecheck triton-server clean

demo: $(DEMO)/.ready
	$(DEMO)/bin/flashcocos demo -o demo_output

test: lint typecheck
	$(PYTEST)

test-fast: $(DEV)/.ready
	$(PYTEST) -m "not slow"

lint: $(DEV)/.ready
	$(DEV)/bin/ruff check .
	$(DEV)/bin/ruff format --check .

# mypy wants to see the package under its own name, which the checkout's folder need not have
typecheck: $(DEV)/.ready
	mkdir -p .typecheck && ln -sfn .. .typecheck/flashcocos
	MYPYPATH=.typecheck $(DEV)/bin/mypy -p flashcocos

$(DEMO)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DEMO)
	$(DEMO)/bin/python $(PIP) --editable ".[cpu]"
	touch $@

$(DEV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DEV)
	$(DEV)/bin/python $(PIP) --editable ".[dev]"
	touch $@

triton-server: $(TRITON)/.ready

# the server in nvidia-pytriton's wheel without the Python packages that it names, and what the models there import:
# with numpy 2 its Python backend sends empty outputs
$(TRITON)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(TRITON)
	grep -v '^numpy==' constraints.txt > $(TRITON)/constraints.txt
	$(TRITON)/bin/python $(PIP:constraints.txt=$(TRITON)/constraints.txt) --editable ".[cpu]" "numpy<2"
	$(TRITON)/bin/python $(PIP) --no-deps nvidia-pytriton==0.7.0
	touch $@

clean:
	rm -rf $(DEMO) $(DEV) $(TRITON) .typecheck demo_output build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
