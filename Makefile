# make demo          translate a real input with the shipped model (no torch needed)
# make test          lint, types and all tests but the next
# make test-cluster  the tests of Ray and of object stores, which CI runs after the others
# make test-fast     the tests of the edit loop: without the slow files that tests/conftest.py lists
# make triton-server .venv-triton, for the tests that run Triton Inference Server; without it they skip
# Each sets up its own virtual environment; PYTHON chooses the interpreter (3.10 to 3.13).

PYTHON ?= python3
DEMO := .venv-demo
DEV := .venv
TRITON := .venv-triton
CLUSTER := .venv-cluster
PIP := -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
# one single-threaded process a core beats one with many threads; a file's tests stay together and share fixtures, and
# the files start in the order of tests/conftest.py
PYTEST := OMP_NUM_THREADS=1 $(DEV)/bin/python -m pytest \
	--numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
CLUSTER_TESTS := tests/test_remote.py tests/runtime/test_cluster.py tests/serve/test_ray_app.py

.PHONY: demo test pytest test-cluster test-fast lint typecheck triton-server clean

demo: $(DEMO)/.ready
	$(DEMO)/bin/flashcocos demo -o demo_output

test: lint
	$(MAKE) --jobs=2 typecheck pytest

pytest: $(DEV)/.ready
	$(PYTEST)

# one process, and a network of its own with loopback alone where the machine allows that: Ray binds the outer address
test-cluster: $(CLUSTER)/.ready
	if unshare -rn ip link set lo up; then alone="unshare -rn" up="ip link set lo up &&"; fi 2>/dev/null; \
	OMP_NUM_THREADS=1 $$alone sh -c "$$up exec $(CLUSTER)/bin/python -m pytest -m cluster $(CLUSTER_TESTS)"

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

# what the environment of the other tests has, with Ray and a server of objects
$(CLUSTER)/.ready: $(DEV)/.ready
	$(PYTHON) -m venv $(CLUSTER)
	$(DEV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		"$$($(CLUSTER)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dev.pth"
	$(CLUSTER)/bin/python $(PIP) --editable ".[dev-cluster]"
	touch $@

clean:
	rm -rf $(DEMO) $(DEV) $(CLUSTER) $(TRITON) .typecheck demo_output build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
