# make demo   a guest and an async device, nothing else needed
# make test   the tests           make lint       ruff and mypy --strict
# make docs   the documentation as a site, in site/
# make venv   only .venv          make test-svm   the KVM tests under a mainstream kvm_amd
# make clean  removes what the others made   make test-soft  the tests, with KVM hidden (root)
# Further arguments for pytest: make test PYTEST="-k uart -x"

PYTHON ?= python3
PYTEST ?=
BIN := .venv/bin
NATIVE := $(wildcard kvmaio/*.c kvmaio/kvm/*.[ch] kvmaio/kvm/build_native.py kvmaio/soft/*.[ch] kvmaio/soft/build_soft.py)
INSTALLED := .venv/kvmaio-installed

.PHONY: venv demo test lint docs test-svm clean
.DELETE_ON_ERROR:

venv: $(INSTALLED)

# The build requirements go into .venv itself: a change of the C core is then
# rebuilt in seconds, and without a network.
$(INSTALLED): pyproject.toml setup.py $(NATIVE)
	@PYTHON="$(PYTHON)" tools/preflight
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@echo "kvmaio: installing into .venv"
	@$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' > .venv/build-requires.txt
	@$(BIN)/pip install --quiet --disable-pip-version-check -r .venv/build-requires.txt
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation -e '.[dev]'
	@touch $@

demo: venv
	@$(BIN)/kvmaio demo

test: venv
	$(BIN)/pytest $(PYTEST)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: venv
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

test-soft: venv
	tools/without-kvm $(BIN)/pytest $(PYTEST)

# The emulated machine is slow, so each test gets ten times the usual 60 s.
test-svm: venv
	tools/svmlab setup
	tools/svmlab run --verbose --timeout 5400 -- \
	    $(BIN)/pytest -m "kvm and not slow" --timeout 600 $(PYTEST)

clean:
	rm -rf .venv build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage htmlcov
	rm -f kvmaio/_answering*.so kvmaio/kvm/_native*.so kvmaio/soft/_soft*.so
	find kvmaio devices tests tools examples -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
