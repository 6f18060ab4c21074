# make help lists the targets. Everything is installed into $(VENV) and built under build/.
PYTHON ?= python3
VENV ?= .venv
# Address of a package index with CPU builds of torch, for `make test` on Linux; empty: the default index.
TORCH_INDEX ?=
PROMPT ?= Once upon a time, in a small village by the sea,
PYTEST_ARGS ?=
BENCH_ARGS ?=
# Compilers and test programs at a time.
JOBS ?= $(or $(shell getconf _NPROCESSORS_ONLN 2>/dev/null),2)
# Processes that run pytest: one for each core, as far as memory goes (tests/conftest.py); 0 runs it in this one.
WORKERS ?= auto

BIN := $(VENV)/bin
PYTHON_VERSION := $(shell $(PYTHON) -c 'import sys; print("%d%d" % sys.version_info[:2])')
CONSTRAINTS := $(wildcard $(CURDIR)/constraints/py$(PYTHON_VERSION).txt)
# uv reads its own variables where pip has PIP_*.
ifdef PIP_FIND_LINKS
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
endif
ifneq ($(CONSTRAINTS),)
export PIP_CONSTRAINT := $(CONSTRAINTS)
export UV_CONSTRAINT := $(CONSTRAINTS)
export UV_BUILD_CONSTRAINT := $(CONSTRAINTS)
endif
INSTALL = if [ -x $(BIN)/uv ]; then set -- uv pip install -q --python $(BIN)/python; \
	else set -- python -m pip install -q; fi; $(BIN)/"$$@"
NATIVE := $(wildcard native/CMakeLists.txt native/src/*.* native/src/*/*.*)
CONFIGURE = $(BIN)/cmake -S native -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DGEMKIT_BUILD_TESTS=ON \
	-DCMAKE_COMPILE_WARNING_AS_ERROR=ON
ZIG_TARGETS := x86_64-windows-gnu x86_64-macos aarch64-macos
export ZIG_GLOBAL_CACHE_DIR ?= $(CURDIR)/build/zig
CTEST = $(BIN)/ctest --output-on-failure --no-tests=error --test-dir

.PHONY: help run test test-native test-more test-sanitize test-cross parity lint types format bench constraints docs clean
help:
	@echo "make run          install gemkit with the demo model and generate text: PROMPT='...'"
	@echo "make test         the native tests, then pytest: PYTEST_ARGS='...' WORKERS=1"
	@echo "make test-more    the other tests of CI: the next two"
	@echo "make test-sanitize  the native tests under sanitizers and on emulated AVX-512"
	@echo "make test-cross   the native tests on emulated ARM; compiles for Windows and macOS"
	@echo "make parity       every implementation against the reference, as a table, into docs/parity.md"
	@echo "make lint         ruff and clang-format, check only, and the next; make format applies them"
	@echo "make types        pyright and mypy, strict, on programs that use gemkit"
	@echo "make bench        speed beside other engines: installs them, measures for half an hour: BENCH_ARGS='...'"
	@echo "make docs         write the generated pages of docs/ anew"
	@echo "make constraints  resolve constraints/*.txt anew"
	@echo "make clean        remove $(VENV), build/ and caches"
	@echo "PYTHON=$(PYTHON) VENV=$(VENV) TORCH_INDEX=$(TORCH_INDEX)"

run: $(VENV)/.run
	$(BIN)/gemkit generate demo --prompt "$(PROMPT)" --max-tokens 64 --temp 0 --verbose

test: $(VENV)/.test test-native
	$(BIN)/python -m pytest -p tests.plugins.budgets -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-native: $(VENV)/.test
	$(CONFIGURE) -B build/plain -DCMAKE_BUILD_TYPE=Release
	$(BIN)/cmake --build build/plain -j $(JOBS)
	$(CTEST) build/plain -j $(JOBS)

# One after the other: each uses all cores.
test-more:
	$(MAKE) test-sanitize
	$(MAKE) test-cross

# The last configuration runs the AVX-512 kernels through SIMDe, where its headers are: Debian's libsimde-dev.
test-sanitize: $(VENV)/.test
	$(CONFIGURE) -B build/asan -DGEMKIT_SANITIZE=address,undefined
	$(BIN)/cmake --build build/asan -j $(JOBS)
	$(CTEST) build/asan -j $(JOBS)
	$(CONFIGURE) -B build/tsan -DGEMKIT_SANITIZE=thread
	$(BIN)/cmake --build build/tsan -j $(JOBS)
	$(CTEST) build/tsan -j $(JOBS)
ifneq ($(wildcard /usr/include/simde/x86/avx512.h),)
	$(CONFIGURE) -B build/simde -DCMAKE_BUILD_TYPE=Release -DGEMKIT_SIMDE_AVX512=ON
	$(BIN)/cmake --build build/simde -j $(JOBS)
	$(CTEST) build/simde -j $(JOBS)
else
	@echo "not run: the emulated AVX-512 kernels, which need SIMDe's headers (Debian: libsimde-dev)"
endif

# The NEON kernels in an emulator, also as a processor without dot products. Then the compiler and the headers of other
# systems, which link nothing: before its first link zig compiles their libraries for minutes.
test-cross: $(VENV)/.test
ifneq ($(and $(shell command -v aarch64-linux-gnu-g++ 2>&1),$(shell command -v qemu-aarch64 2>&1)),)
	$(CONFIGURE) -B build/aarch64 -DCMAKE_BUILD_TYPE=Release -DGEMKIT_OPTIMISE=-O2 \
	  -DCMAKE_TOOLCHAIN_FILE=$(CURDIR)/native/cmake/aarch64-linux.cmake
	$(BIN)/cmake --build build/aarch64 -j $(JOBS)
	$(CTEST) build/aarch64 -j $(JOBS)
else
	@echo "not run: the NEON kernels, which need a cross compiler and an emulator (Debian: g++-aarch64-linux-gnu qemu-user)"
endif
	for target in $(ZIG_TARGETS); do \
	  $(CONFIGURE) -B build/$$target -DGEMKIT_COMPILE_ONLY=ON -DGEMKIT_OPTIMISE=-O0 -DGEMKIT_ZIG_TARGET=$$target \
	    -DCMAKE_TOOLCHAIN_FILE=$(CURDIR)/native/cmake/zig.cmake -DPython_EXECUTABLE=$(abspath $(BIN)/python) || exit 1; \
	  $(BIN)/cmake --build build/$$target -j $(JOBS) || exit 1; \
	done

parity: $(VENV)/.test
	$(BIN)/python tests/parity/grid.py --write

lint: $(VENV)/.lint types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find native -name '*.cc' -o -name '*.h' | xargs $(BIN)/clang-format --dry-run -Werror

types: $(VENV)/.lint
	$(BIN)/python tests/typing/readme.py build/types
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/mypy

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find native -name '*.cc' -o -name '*.h' | xargs $(BIN)/clang-format -i

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/cpu/run.py $(BENCH_ARGS)
	.venv-bench/bin/python benchmarks/cpu/plots.py

docs: $(VENV)/.test
	$(BIN)/python tests/test_docs.py --write

# Pins without addresses: local version labels and CUDA's packages are dropped.
constraints: $(VENV)/.venv
	mkdir -p build
	for v in 311 312 313; do \
	  env -u UV_CONSTRAINT -u UV_BUILD_CONSTRAINT $(BIN)/uv pip compile -q --all-extras --no-annotate --no-header \
	    --python-version 3.$${v#3} pyproject.toml > build/constraints.txt || exit 1; \
	  sed -e 's/+cpu$$//' -e '/^nvidia-/d' -e '/^cuda-/d' -e '/^triton/d' build/constraints.txt > constraints/py$$v.txt; \
	done

clean:
	rm -rf $(VENV) .venv-bench build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.venv:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("gemkit needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q uv || echo "no uv here, going on with pip"
	@touch $@

# The build tools stay in the environment, so that a second build compiles only what changed.
$(VENV)/.tools: $(VENV)/.venv pyproject.toml $(CONSTRAINTS)
	@$(INSTALL) scikit-build-core nanobind cmake ninja
	@touch $@

$(VENV)/.run: $(VENV)/.tools pyproject.toml $(CONSTRAINTS) $(NATIVE)
	@echo "compiling and installing gemkit and the demo model"
	@$(INSTALL) --no-build-isolation -e '.[demo]'
	@touch $@

$(VENV)/.test: $(VENV)/.tools pyproject.toml $(CONSTRAINTS) $(NATIVE)
	@$(if $(TORCH_INDEX),$(INSTALL) --no-deps --index-url $(TORCH_INDEX) torch==2.13.0)
	@echo "compiling and installing gemkit, the demo model and what the tests need"
	@$(INSTALL) --no-build-isolation -e '.[demo,test]'
	@touch $@ $(VENV)/.run

# OpenVINO's converter wants other versions, and so an environment of its own within the first. It needs no torchvision,
# and does not start with one that was built for another torch.
BENCH_PIP = env -u PIP_CONSTRAINT .venv-bench$(1)/bin/python -m pip install -q
$(VENV)/.bench: $(VENV)/.run
	@echo "installing the engines to compare with; llama.cpp is compiled for this machine"
	$(PYTHON) -m venv .venv-bench
	CMAKE_ARGS="-DGGML_NATIVE=ON" $(call BENCH_PIP) --no-binary llama-cpp-python llama-cpp-python==0.3.36
	$(PYTHON) -m venv .venv-bench/openvino
	$(if $(TORCH_INDEX),$(call BENCH_PIP) --index-url $(TORCH_INDEX) torch==2.13.0)
	$(if $(TORCH_INDEX),$(call BENCH_PIP,/openvino) --index-url $(TORCH_INDEX) torch==2.13.0)
	$(call BENCH_PIP) torch==2.13.0 transformers==5.23.0 ctranslate2==4.8.5 matplotlib==3.11.2
	$(call BENCH_PIP,/openvino) torch==2.13.0 transformers==5.0.0 optimum-intel==2.2.0 openvino-genai==2026.4.1.0
	.venv-bench/openvino/bin/python -m pip uninstall -q -y torchvision
	@touch $@

$(VENV)/.lint: $(VENV)/.venv $(CONSTRAINTS)
	@$(INSTALL) ruff clang-format basedpyright mypy numpy
	@touch $@
