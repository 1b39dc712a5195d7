# `make demo` and `make test` need Python 3.10-3.13 and nothing else.
#   PYTHON=python3.12   another interpreter        VENV=path       another environment
#   PIP_ARGS=           the latest versions instead of the tested ones in constraints.txt
# Experiments are scripts: recipes/emoji/*.py, recipes/compare/compare.py and recipes/benchmark.py.
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?= -c constraints.txt
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS)
# Tests wait for processes and files: one worker more than there are cores, four at most.
WORKERS := $(shell cores=$$(getconf _NPROCESSORS_ONLN); echo $$((cores < 4 ? cores + 1 : 4)))
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal
# No test and no recipe reads from a hub.
export HF_HUB_OFFLINE ?= 1

define NO_CPU_TORCH
This machine has no NVIDIA driver, and the PyTorch that pip finds is the CUDA build: gigabytes that would lie idle.
Show pip the CPU build (pytorch.org, "Get started", names the address):  PIP_EXTRA_INDEX_URL=address make ...
or install the CUDA build all the same:                                  make CUDA=1 ...
endef
export NO_CPU_TORCH

.PHONY: setup demo serve web check test test-slow faults fuzz faults-server fuzz-server docs format emoji-gpu clean

$(VENV)/.core: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@test -n "$(CUDA)$$(command -v nvidia-smi)" || ! $(PIP) --dry-run --report - torch | grep -q '"name": "nvidia-' \
		|| { echo "$$NO_CPU_TORCH"; exit 1; }
	$(PIP) -e .
	touch $@

$(VENV)/.dev: $(VENV)/.core
	$(PIP) -e '.[dev,eval,report,browser,finetune,tensorboard,wandb,ray,onnx,openvino,serve,docs]'
	touch $@

$(VENV)/.serve: $(VENV)/.core
	$(PIP) -e '.[serve]'
	touch $@

$(VENV)/.onnx: $(VENV)/.core
	$(PIP) -e '.[onnx]'
	touch $@

setup: $(VENV)/.dev

demo: $(VENV)/.core
	$(BIN)/latent-shift generate "smiling face with sunglasses" --seed 0 -o out/demo.mp4 -o out/demo.gif -o out/demo.png

# The page, at http://127.0.0.1:8000; OPTIONS="--port 9000 --workers 2" for others, see `latent-shift serve --help`.
serve: $(VENV)/.serve
	$(BIN)/latent-shift serve $(OPTIONS)

# The model in a page, on no server, at http://127.0.0.1:8080; needs npm. out/web can be copied to any static host.
web: $(VENV)/.onnx
	$(BIN)/latent-shift export out/web --web
	(sleep 1; $(BIN)/python -m webbrowser http://127.0.0.1:8080/) &
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory out/web 8080

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check
	$(PYTEST) -m "not slow"

# The tests whose fast twins `make test` runs.
test-slow: $(VENV)/.dev
	$(PYTEST) -m slow

# What is lost by kills, full disks, Ctrl-C and second processes, as tables.
faults: $(VENV)/.dev
	$(BIN)/python tests/faults.py 50 -o docs/results/faults.json
	$(BIN)/python tests/command_faults.py -o docs/results/command-faults.json

faults-server: $(VENV)/.dev
	$(BIN)/python tests/server_faults.py -o docs/results/server-faults.json

# 5,000 wrong requests to the server; NUM=300 sends fewer.
fuzz-server: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz_server.py -o docs/results/fuzz-server.json

# 10,000 bad inputs of every kind, and what becomes of each. Half an hour on two cores; NUM=300 tries fewer.
NUM ?= 10000
fuzz: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py --num $(NUM) $(if $(filter 10000,$(NUM)),-o docs/results/fuzz.json)

# The documentation as a site in site/; a broken link or reference is an error.
docs: $(VENV)/.dev
	$(BIN)/python docs/settings.py
	$(BIN)/mkdocs build --strict

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Train and measure `emoji` on one GPU, meant for ten minutes of an H100 (not yet run on one). FRACTION=0.01 DEVICE=cpu rehearses it on any machine; data/emoji-small
# must be there (`python recipes/emoji/gpu.py pack`).
FRACTION ?= 1
DEVICE ?= cuda
emoji-gpu: $(VENV)/.dev
	$(BIN)/python recipes/emoji/gpu.py train --fraction $(FRACTION) --device $(DEVICE)

clean:
	rm -rf $(VENV) out
