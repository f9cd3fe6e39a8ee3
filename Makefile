# Every target builds what it needs: a virtual environment in .venv, once, and again when the pins change.

PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3)
EXTRAS := dev,parquet,train,zstd
INSTALL := install --quiet --disable-pip-version-check --constraint constraints.txt
PIP := .venv/bin/python -m pip $(INSTALL)

# Tests and the demo talk to this machine alone: no proxy may come between.
LOOPBACK := localhost,127.0.0.1,::1
export NO_PROXY := $(if $(NO_PROXY),$(NO_PROXY),$(no_proxy)),$(LOOPBACK)
export no_proxy := $(NO_PROXY)

.PHONY: demo test bench soak lint docs

demo: .venv/ready
	.venv/bin/python examples/read_python.py

test: lint .venv-jax/ready
	rm -rf .coverage
	mkdir .coverage
	.venv/bin/coverage run -m pytest -n 4 -q --durations 10
	.venv/bin/coverage combine --quiet
	.venv/bin/coverage report

soak: .venv/ready
	.venv/bin/python -m pytest -m soak -q -o faulthandler_timeout=7200 tests

bench: .venv/ready
	.venv/bin/python benchmarks/bench.py

lint: .venv/ready
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict
	@echo "the site is in site/"

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "penstock needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python"; exit 1; }
	@test -x .venv/bin/python && .venv/bin/python -m pip --version >/dev/null 2>&1 || { \
		rm -rf .venv; $(PYTHON) -m venv .venv >.venv.log 2>&1 || { cat .venv.log; rm -rf .venv .venv.log; \
		echo "$(PYTHON) -m venv failed. On Debian and Ubuntu the package is missing: apt install python3-venv"; \
		exit 1; }; rm -f .venv.log; }
	$(PIP) hatchling editables
	$(PIP) --no-build-isolation --editable '.[$(EXTRAS)]'
	@touch $@

# JAX is no dependency: tests that need it run in an environment of their own, which has all of .venv, and JAX.
.venv-jax/ready: .venv/ready tests/train/jax.txt
	rm -rf .venv-jax
	.venv/bin/python -m venv --without-pip .venv-jax
	@.venv/bin/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		>"$$(.venv-jax/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/venv.pth"
	.venv/bin/python -m pip --python .venv-jax $(INSTALL) --requirement tests/train/jax.txt
	@touch $@

.venv/docs: .venv/ready
	$(PIP) --no-build-isolation --editable ".[$(EXTRAS),docs]"
	@touch $@
