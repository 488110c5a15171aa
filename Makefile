# make demo: from a fresh machine to the cost-accuracy curve of a trained net and the instance for a budget.
# make test: from a fresh machine to green tests. Both install into .venv the versions that were tested together.

PYTHON ?= python3
# A worker that dies ends the tests and is named: to replace it would leave them waiting for ever.
PYTEST_ARGS ?= -n 2 --dist loadgroup --max-worker-restart=0
BIN = .venv/bin
PINS = requirements/$(shell $(PYTHON) -c 'import sys; print("py311" if sys.version_info < (3, 12) else "py312")').txt

.PHONY: demo test lint extras clean

demo: .venv/installed
	$(BIN)/python train.py --config=configs/digits.py --workdir=runs/digits
	$(BIN)/python train.py --config=configs/digits.py --config.instances=full --workdir=runs/digits_plain
	$(BIN)/python evaluate.py --workdir=runs/digits_plain
	$(BIN)/python evaluate.py --workdir=runs/digits --baseline=runs/digits_plain
	$(BIN)/python -m sdpoint_jax select runs/digits/sweep/artefact --relative-budget=0.5

test: .venv/installed_dev
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: .venv/installed_dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What the tests of the optional extras need, but for PyTorch, and for Debian's chromium.
extras: .venv/installed_dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(PINS) \
		--editable '.[dev,export,onnx,predict,ray,serve]' playwright

clean:
	rm -rf .venv runs

.venv/installed: setup.cfg pyproject.toml $(PINS)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(PINS) --editable .
	touch $@

.venv/installed_dev: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(PINS) --editable '.[dev]'
	touch $@
