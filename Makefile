# Each target builds the environment that it needs in .venv: python3 (3.10 or newer, with venv), git and make are enough.
# What machines run besides is in .ci/run.
PYTHON ?= python3
VENV ?= .venv
# Modules are compiled once, even where the environment forbids it: else each process compiles PyTorch's for 5 s.
export PYTHONDONTWRITEBYTECODE =
# Threads that wait for others sleep. On a busy machine, threads that spin instead make a call up to 600 times as slow.
export OMP_WAIT_POLICY = PASSIVE
# Inductor precompiles headers for 6 s, and GCC takes as long with them as without. It compiles programs for 8 s that test
# which vectors the processor has, as the processor says itself. It compiles in another process, which imports PyTorch first.
export TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS = 0
export TORCHINDUCTOR_VEC_ISA_OK = 1
export TORCHINDUCTOR_COMPILE_THREADS = 1
# Python compiles modules when they are imported; most installed modules never are.
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile
PYTEST = $(VENV)/bin/python -m pytest
CPP = $(wildcard kernels/*.cpp kernels/*.h)
# Processes of pytest: one for each core, at most four, as each loads PyTorch and the frameworks.
PARALLEL ?= --numprocesses logical --maxprocesses 4
# What make test runs: cases that are not marked as more, each fifth case of a test in the slow interpreter, and each
# fortieth of compiled kernels, which are executed more slowly still. make test-more and .ci/run PART run others.
MOST ?= -m "not more"
INTERPRETED ?= --sample=5
EXECUTED ?= --sample=40
# What executes them is compiled by gcc, and Triton has no other platform.
EXECUTES = $(and $(filter Linux,$(shell uname)),$(shell command -v gcc 2>/dev/null))

.PHONY: help demo test test-more test-fast pytest test-interpreted test-ptx bench bench-all lint docs clean
help:
	@echo "make demo    train an AWD-LSTM with AR and TAR and without, and print the difference (ARGS='--epochs 1' for options)"
	@echo "make test    run the tests that most changes need, in five minutes: CPU, interpreted kernels, kernels compiled"
	@echo "             for an H100 and run on the CPU, kernels on a GPU if there is one, one release of each framework"
	@echo "make test-more   run the others: more releases of fastai, the study, the notebook, builds, longer sequences"
	@echo "make test-fast   run the essential tests, less than a minute: after each change"
	@echo "make bench   measure what AR and TAR add to training steps, on the GPU if there is one, and render the tables of"
	@echo "             the README and docs: ten minutes on two idle cores (.venv/bin/python -m pytest bench for some)"
	@echo "make bench-all   the same with all other benchmarks: an hour"
	@echo "make lint    check style, types and imports"
	@echo "make docs    build the documentation site in build/site, and check its links"
	@echo "make clean   remove the environments, caches and build folders"
	@echo "VENV=folder takes another environment than .venv. .ci/run --help lists more checks, and .ci/run runs all of them."

demo: $(VENV)/demo
	@echo "== demo: a word-level AWD-LSTM learns the King James text, with AR and TAR and without"
	$(VENV)/bin/python -m bench.study.demo $(ARGS)

test: $(VENV)/test $(VENV)/frameworks
	@$(MAKE) --no-print-directory --keep-going pytest test-interpreted $(if $(EXECUTES),test-ptx) ARGS='$(MOST)'

test-more: $(VENV)/test $(VENV)/frameworks
	@echo "== what make test leaves out, and all samples through the interpreter"
	@$(MAKE) --no-print-directory --keep-going pytest test-interpreted ARGS='-m more' INTERPRETED=

test-fast: $(VENV)/test
	@echo "== the essential tests, less than a minute on two cores; make test and make test-more run all"
	$(PYTEST) -q -m "not gpu and not more and not slow" tests/call tests/attach

# These run in any environment, with the options in ARGS: .ci/run tests the oldest and the newest PyTorch by them.
pytest: $(VENV)/test $(VENV)/frameworks
	@echo "== C++ kernels on the CPU, Triton kernels compiled for real GPUs, and the frameworks"
	$(PYTEST) $(PARALLEL) $(ARGS)

test-interpreted: $(VENV)/test
	@echo "== the same samples through the Triton kernels in Triton's interpreter"
	TRITON_INTERPRET=1 $(PYTEST) $(PARALLEL) -m "numbers or interpreted" -k "not repeats_bitwise" \
	    $(INTERPRETED) tests/kernels tests/call

test-ptx: $(VENV)/test
	@echo "== the kernels as compiled for an H100, run on the CPU instruction by instruction"
	$(PYTEST) $(PARALLEL) -p tests.kernels.ptx -m "numbers and not gpu" $(EXECUTED) tests/kernels tests/call

# glibc's allocator reads these variables when a process starts. Without them it returns large blocks to the system.
KEPT = MALLOC_TRIM_THRESHOLD_=4073741824 MALLOC_MMAP_THRESHOLD_=1073741824
BENCH = PYTHON=$(VENV)/bin/python KINETO_LOG_LEVEL=99 bash bench/run.sh
# The report names the rows that are missing. HEADLINES selects the tables of the README and of Performance.
HEADLINES = -m headline
bench: $(VENV)/test $(VENV)/frameworks
	@echo "== steps, with the allocator as it is and then with memory kept by it: ten minutes on two idle cores"
	mkdir -p .benchmarks && rm -f .benchmarks/kept.jsonl .benchmarks/default.jsonl
	-$(BENCH) 3600 .benchmarks/default.jsonl bench --benchmark-max-time=0.4 $(HEADLINES)
	-$(KEPT) $(BENCH) 3600 .benchmarks/kept.jsonl bench --benchmark-max-time=0.2 $(HEADLINES)
	$(VENV)/bin/python -m bench.measure.report .benchmarks/default.jsonl .benchmarks/kept.jsonl

bench-all:
	@$(MAKE) --no-print-directory bench HEADLINES=

lint: $(VENV)/lint
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python
	$(VENV)/bin/lint-imports --no-cache
	$(PYTEST) -q tests/project/test_docs.py -k pyright

# The site has the layout of the checkout, so that each relative link works in both.
# Each example gets a page with its code. A warning fails the build, but not with --quiet. The theme announces its successor.
PAGES = $(wildcard *.md docs/*.md docs/*.png docs/*.css bench/*.md bench/results/*.md examples/*.py examples/*.ipynb)
docs: $(VENV)/docs
	rm -rf build/docs build/site
	mkdir -p build/docs
	cp --parents $(PAGES) LICENSE CITATION.cff build/docs
	for file in examples/*.py; do \
	    printf '# %s\n\n````python\n%s\n````\n' "$$file" "$$(cat $$file)" > build/docs/$${file%.py}.md; done
	$(VENV)/bin/jupyter-nbconvert --log-level=WARN --to markdown --output-dir build/docs/examples \
	    --output fastai_notebook examples/fastai_lm.ipynb
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build

# Each stamp records that fastreg is installed with the packages that one target needs.
$(VENV)/demo: pyproject.toml setup.py $(CPP)
	@echo "== building $(VENV) (PyTorch is large: the first time takes minutes)"
	@$(PYTHON) -m venv $(VENV) || { echo "python3 lacks venv: on Debian and Ubuntu, apt-get install python3-venv"; exit 1; }
	@echo "== installing PyTorch and fastreg, and building its C++ kernels, if there is a C++ compiler"
	$(PIP) 'setuptools>=77'
	$(VENV)/bin/python setup.py --quiet build_ext & $(PIP) torch && wait  # unpacking PyTorch takes as long
	@# Meanwhile Python compiles PyTorch's modules. NumPy, which it tries to import, may be installed in part.
	$(VENV)/bin/python -c 'import torch._inductor.compile_fx' 2>/dev/null & $(PIP) --editable '.[demo]' && wait
	@touch $@

$(VENV)/test: $(VENV)/demo
	$(PIP) --editable '.[test,bench]'
	@touch $@

# The frameworks that the adapters are tested against.
$(VENV)/frameworks: $(VENV)/demo tests/frameworks.sh
	@echo "== installing fastai, Lightning and transformers"
	@bash tests/frameworks.sh $(VENV)
	@touch $@

$(VENV)/docs: $(VENV)/demo
	$(PIP) --editable '.[docs]'
	@touch $@

$(VENV)/lint: $(VENV)/test $(VENV)/frameworks
	$(PIP) --editable '.[lint]'
	@touch $@

clean:
	rm -rf .venv .venv-oldest .venv-newest .benchmarks build *.egg-info .pytest_cache .ruff_cache
