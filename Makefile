# Two commands do everything: `make demo` and `make test`. Both make .venv first if it is missing.

PYTHON ?= python3
# The torch that the demo and the tests were run with. The project itself takes any torch >= 2.5; without CUDA's
# gigabytes: make demo TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
MODEL := demo/SmolLM2-135M-Instruct
GGUF := demo/smollm2-135m.gguf
QUICK := build/quick.gguf
QUESTION := What is the capital of France?
CORES := $(shell getconf _NPROCESSORS_ONLN)
# Of Debian: a compiler for 64-bit ARM, its libc, and an emulator that runs the result.
ARM_CC := aarch64-linux-gnu-gcc
ARM_RUN := qemu-aarch64
ARM_PACKAGES := gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user

.PHONY: demo test lint ctest ctest-arm arm-tools arm-packages clean

demo: $(GGUF)
	$(PY) -m dbf2gguf inspect $(GGUF)
	@echo "> $(QUESTION)"
	$(PY) -m runtime.chat $(GGUF) -p "$(QUESTION)" --temp 0 --max-tokens 80 --stats

test: $(INSTALLED)
	$(PY) -m pytest

# A real model, converted badly but in a minute: with DBF_TEST_GGUF=build/quick.gguf, `make test` compares the
# runtime with transformers on it where `make demo` has not run.
$(QUICK): $(MODEL)/config.json
	mkdir -p $(@D)
	$(PY) -m dbf2gguf $(MODEL) $@ --calib README.md --calib docs/FORMAT.md --calib Makefile \
		--preset fast --text-rows 12 --admm-iterations 3 --distill-steps 1 --force

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The C core alone: warnings are errors, AddressSanitizer and UBSan watch its self-test.
ctest:
	cmake -S cext -B build/ctest -DDBF_WERROR=ON -DDBF_SANITIZE=ON -DCMAKE_BUILD_TYPE=Release
	cmake --build build/ctest --parallel $(CORES)
	ctest --test-dir build/ctest --output-on-failure --parallel $(CORES)

# The same on 64-bit ARM (NEON), cross-compiled, static and emulated; without the sanitizers.
ctest-arm: arm-tools
	cmake -S cext -B build/ctest-arm -DDBF_WERROR=ON -DCMAKE_BUILD_TYPE=Release \
		-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_C_COMPILER=$(ARM_CC) \
		-DCMAKE_EXE_LINKER_FLAGS=-static -DCMAKE_CROSSCOMPILING_EMULATOR=$(ARM_RUN)
	cmake --build build/ctest-arm --parallel $(CORES)
	ctest --test-dir build/ctest-arm --output-on-failure --parallel $(CORES)

arm-tools:
	@command -v $(ARM_CC) >/dev/null && command -v $(ARM_RUN) >/dev/null \
		&& echo '#include <math.h>' | $(ARM_CC) -static -x c -fsyntax-only - \
		|| { echo "error: no $(ARM_CC) with its libc, or no $(ARM_RUN);" \
			"on Debian: apt-get install $(ARM_PACKAGES)" >&2; exit 1; }

arm-packages:
	@echo $(ARM_PACKAGES)

$(GGUF): $(MODEL)/config.json
	$(PY) -m dbf2gguf $(MODEL) $(GGUF) --bpw 2.0 --preset fast

$(MODEL)/config.json: | $(INSTALLED)
	$(PY) -m dbf2gguf.demo $(MODEL)

$(INSTALLED): pyproject.toml $(wildcard cext/*.h cext/*.py cext/CMakeLists.txt cext/src/*)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet $(TORCH)
	$(PY) -m pip install --quiet -e ".[dev]"
	touch $@

clean:
	rm -rf build $(VENV)
