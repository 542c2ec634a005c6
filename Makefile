# make          from a fresh clone to samples: installs, prepares the embedded dataset, trains, samples
# make chat     a small model that answers: prepares its conversations, trains for ten minutes, opens a conversation;
#               make chat MINUTES=1 trains for one
# make test     lint and the fast tests: what to run before each commit
# make test-all    these and all others, but for those that need a GPU
# make test-gpu    the tests that need a GPU, and how long each took
# make test-oldest   the fast tests with the oldest versions that pyproject.toml allows
# make bench    how fast this machine trains
# make lines    how long each script and part is
# make notebooks   run the notebooks and keep what they print and draw
# make scaling     the sweep behind scaling_laws.ipynb: what scaling.json lacks, under an hour on 2 cores
PYTHON ?= python3
OLDEST ?= $(PYTHON)
PY := .venv/bin/python
OLD := .venv-oldest/bin/python
OUT := out-python-char
MINUTES := 10

# a worker for each core, but for four at most: each holds 0.7 GB
WORKERS := -n auto --maxprocesses=4 --dist=worksteal

.PHONY: all train sample chat test test-full test-all test-gpu test-oldest lint lines bench notebooks scaling clean
all: sample

# the pins are installed again only when they change; matplotlib, so that a run leaves loss.png, has its pin there too
PLOT = $(shell grep -E '^(matplotlib|plotext)==' requirements-dev.txt)
.venv/runtime: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit("flatgpt needs Python 3.11 or newer: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	@echo 'Installing into .venv: on Linux with CUDA about 3 GB to download; README.md says how to get it without, 0.3 GB.'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --disable-pip-version-check --progress-bar=on -r requirements.txt $(PLOT)
	@touch $@

.venv/dev: .venv/runtime requirements-dev.txt
	@echo 'Installing what the tests need: about 0.2 GB to download.'
	$(PY) -m pip install --disable-pip-version-check --progress-bar=on -r requirements-dev.txt
	@touch $@

data/python_char/meta.json: .venv/runtime data/python_char/prepare.py
	$(PY) data/python_char/prepare.py

# goes on where an interrupted run stopped; a finished one is not trained again
train: data/python_char/meta.json
	$(PY) train.py config/train_python_char.py --out_dir=$(OUT) --init_from=auto

sample: train
	$(PY) sample.py --out_dir=$(OUT) --num_samples=3 --max_new_tokens=400 --temperature=0.6 --start="def "

data/chat/meta.json: .venv/runtime data/chat/prepare.py flatgpt/tasks.py
	$(PY) data/chat/prepare.py

chat: data/chat/meta.json
	$(PY) train.py config/chat_tiny.py --init_from=auto --max_minutes=$(MINUTES)
	$(PY) chat.py --out_dir=out-chat-tiny --temperature=0 --max_new_tokens=60

bench: .venv/runtime
	$(PY) bench.py

notebooks: .venv/dev
	$(PY) -m tests.notebooks

scaling: data/python_char/meta.json
	$(PY) -m flatgpt.sweep

# lines of code per file
lines:
	@wc -l *.py flatgpt/*.py | sort -n

lint: .venv/dev
	$(PY) -m ruff check .

test: lint
	$(PY) -m pytest -m "not full and not gpu" $(WORKERS)

# with five times the examples of hypothesis
test-full: .venv/dev
	HYPOTHESIS_PROFILE=many $(PY) -m pytest -m "(full or hypothesis) and not gpu" $(WORKERS)

test-all: test
	$(MAKE) test-full

# four processes share the GPU, because most of the time is compilation; other versions may warn of other things
test-gpu: .venv/dev
	$(PY) -m pytest tests/test_gpu.py -m gpu -n 4 -W default --durations=20 -rs

.venv-oldest/installed: requirements-oldest.txt
	@$(OLDEST) -c 'import sys; sys.exit("numpy 2.0 needs Python 3.11 or 3.12: make test-oldest OLDEST=python3.11" if sys.version_info[:2] not in ((3, 11), (3, 12)) else 0)'
	$(OLDEST) -m venv .venv-oldest
	$(OLD) -m pip install --quiet --disable-pip-version-check -r requirements-oldest.txt
	@touch $@

test-oldest: .venv-oldest/installed
	$(OLD) -m pytest -m "not full and not gpu" $(WORKERS)

clean:
	rm -rf .venv .venv-oldest $(OUT) bench_log
