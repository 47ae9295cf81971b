# make demo: from a fresh machine to pictures and a table.   make test: from a fresh machine to green.
# Needs python3 (3.11 or newer, with venv) and make. Everything is installed into .venv, from the pins in requirements.lock.
PYTHON = python3
VENV = .venv
REQUIREMENTS = requirements.lock
RUN = $(VENV)/bin/python
DEMO = $(RUN) train.py --model tiny --cache runs/demo/cache --trajectories 2048 --batch 64 --updates 560

all: demo

$(VENV)/ready: $(REQUIREMENTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: %s is older than 3.11; name a newer one: make PYTHON=python3.12" % sys.executable)'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r $(REQUIREMENTS)
	touch $@

# progressive reflow 8 -> 4 -> 2 -> 1, and straight to one window with as many updates; then both against the teacher
demo: $(VENV)/ready
	$(DEMO) --out runs/demo
	$(DEMO) --recipe reflow --out runs/demo/reflow
	$(RUN) eval.py runs/demo

# every table and figure of the studies, and the pages made of them: some five hours on two cores, resumable
study: $(VENV)/ready
	$(RUN) -m studies all
	$(RUN) -m studies.results

test: $(VENV)/ready
	$(RUN) -m pytest -m "not slow" -n 2 --dist worksteal

test-slow: $(VENV)/ready
	$(RUN) -m pytest -m slow

# the suite on the oldest versions that pyproject.toml allows
test-lowest:
	$(MAKE) test VENV=.venv-lowest REQUIREMENTS=requirements-lowest.txt

lint: $(VENV)/ready
	$(RUN) -m ruff check .

# rebuild the embedded model from the sprites: hours, resumable
tiny: $(VENV)/ready
	$(VENV)/bin/torchrun --nproc_per_node=2 -m tools.tiny

clean:
	rm -rf $(VENV) .venv-lowest runs .pytest_cache .ruff_cache __pycache__ tests/__pycache__

.PHONY: all demo study test test-slow test-lowest lint tiny clean
