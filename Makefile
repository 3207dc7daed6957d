# Every target but gpu-report sets up what it needs: a virtual environment in .venv with the versions of
# requirements-dev.txt, and the package built into it. gpu-report takes the torch that PYTHON has.
PYTHON ?= python3
VENV ?= .venv
DATA ?= digits
OUT ?= benchmarks/results/gpu
TORCH ?= 2.12.1
EXAMPLES ?= 2000
BIN := $(VENV)/bin
# What depends on the torch that runs it.
TORCH_TESTS := accuracy batches module fixed_centroids checkpoints prediction optim optim_state transforms compile \
  steps focus metrics

.PHONY: demo test fuzz lint docs bench bench-compare gpu-report figures wheel test-torch sanitize clean

demo: $(VENV)/.built  ## train with cross-entropy and with NCMI, print a table, draw the curves (DATA=fashion-mnist)
	$(BIN)/python benchmarks/demo.py --data $(DATA) $(ARGS)

test: $(VENV)/.built  ## the whole test suite, a process a core
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile $(ARGS)

fuzz: $(VENV)/.built  ## the public API against the definition in float64, on examples that no one thought of (EXAMPLES=20000)
	NCMI_FUZZ=$(EXAMPLES) $(BIN)/python -m pytest tests/test_fuzz.py $(ARGS)

lint: $(VENV)/.dependencies  ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/.built  ## the documentation, in docs/build/html; a warning is an error
	$(BIN)/python -m sphinx -q -W --keep-going -E -d docs/build/cache docs docs/build/html
	@echo 'docs/build/html/index.html'

bench: $(VENV)/.built  ## the loss's speed, saved by pytest-benchmark (compare: make bench ARGS=--benchmark-compare)
	$(BIN)/python -m pytest tests/test_benchmarks.py --benchmark-only --benchmark-autosave $(ARGS)

bench-compare: $(VENV)/.built  ## whether the working tree is slower than another revision (BASE=main~1)
	@test -n "$(BASE)" || { echo 'BASE: got none, expected a revision, as in make bench-compare BASE=main~1'; exit 2; }
	$(BIN)/python benchmarks/compare.py --base "$(BASE)" $(ARGS)

gpu-report:  ## on a machine with a CUDA GPU and torch: build, test, sanitise and measure in nine minutes, into OUT
	$(PYTHON) benchmarks/gpu_report.py --out "$(OUT)" $(ARGS)

figures: $(VENV)/.built  ## tables and figures of the README and of the pages, from the measurements
	$(BIN)/python benchmarks/figures.py $(ARGS)

wheel: $(VENV)/.dependencies  ## an abi3 wheel in dist/, tried in a second virtual environment
	rm -rf build dist
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	$(PYTHON) -m venv --clear $(VENV)-wheel
	grep -E '^(torch|numpy)==' requirements-dev.txt > dist/requirements.txt
	$(VENV)-wheel/bin/python -m pip install --quiet -r dist/requirements.txt
	$(VENV)-wheel/bin/python -m pip install --quiet --no-deps dist/ncmi_kernels-*.whl
	cd dist && ../$(VENV)-wheel/bin/python ../tests/smoke.py && ../$(VENV)-wheel/bin/python -m ncmi_kernels check

test-torch: $(VENV)-torch-$(TORCH)/.dependencies  ## the package built and tested with another torch (TORCH=2.12.1)
	rm -rf build
	$(VENV)-torch-$(TORCH)/bin/python -m pip install --quiet --no-build-isolation --no-deps --force-reinstall .
	$(VENV)-torch-$(TORCH)/bin/pytest $(ARGS) $(addprefix tests/test_,$(addsuffix .py,$(TORCH_TESTS)))

sanitize: $(VENV)-sanitize/.dependencies  ## the CPU kernels under AddressSanitizer, UBSan and ThreadSanitizer
	bash tests/sanitize/run.sh $(abspath $(VENV)-sanitize/bin) $(ARGS)

clean:
	rm -rf $(VENV) $(VENV)-* build dist docs/build *.egg-info ncmi_kernels/_C*.so ncmi_kernels/_cuda*.so

$(VENV)/.dependencies: requirements-dev.txt
	@echo 'Installing requirements-dev.txt into $(VENV), torch among it: minutes; 2.5 GB, more where torch comes with CUDA'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

$(VENV)-torch-$(TORCH)/.dependencies: requirements-dev.txt
	$(PYTHON) -m venv --clear $(@D)
	grep -E '^(numpy|wheel|ninja|pytest|torchmetrics|lightning-utilities)' $< > $(@D)/requirements.txt
	$(@D)/bin/python -m pip install --quiet torch==$(TORCH) 'setuptools>=77' -r $(@D)/requirements.txt
	touch $@

$(VENV)-sanitize/.dependencies: requirements-dev.txt
	$(PYTHON) -m venv --clear $(@D)
	grep -E '^(torch=|numpy|setuptools|wheel|pytest)' $< > $(@D)/requirements.txt
	$(@D)/bin/python -m pip install --quiet -r $(@D)/requirements.txt
	touch $@

$(VENV)/.built: $(VENV)/.dependencies setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.*)
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@
