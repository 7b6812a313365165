PYTHON  ?= $(shell command -v python3.11 || command -v python3)
PRESET  ?= lesson
DATASET ?= chest_phantom
SEED    ?= 0
SCALE   ?= cpu
TABLES  ?= runs/study/$(SCALE)
SLIDES  ?= slides
STUDENT ?= student
PY      := .venv/bin/python
READY   := .venv/.ready

.PHONY: help run lab student slides test browser bench bench-gpu study
help: ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18
	@echo "  variables        PRESET=smoke|lesson|paper  DATASET='name ...'  SEED='0 1 ...'  SCALE=smoke|cpu|gpu  TABLES=runs/study/cpu  OPTIONS='--jobs 1 ...'  PYTHON=python3.11"

run: $(READY) ## execute the notebook series; pages in executed/index.html
	$(PY) -m mocolayers series --preset $(PRESET) --dataset $(DATASET) --seed $(SEED) $(OPTIONS)

lab: $(READY) ## open the notebooks in JupyterLab
	$(PY) -m jupyterlab notebooks

student: $(READY) ## copy the notebooks without solutions and outputs into student/, or into STUDENT=FOLDER
	@test ! -e $(STUDENT) || { echo "$(STUDENT)/ is there already, perhaps with a student's work, and is left as it is;" \
	  "move it away, or name a new folder: make student STUDENT=autumn"; exit 1; }
	$(PY) -m jupyter nbconvert --log-level WARN --to notebook --output-dir $(STUDENT).partial --ClearOutputPreprocessor.enabled=True \
	  --TagRemovePreprocessor.enabled=True --TagRemovePreprocessor.remove_cell_tags=solution notebooks/[0-9][0-9]_*.ipynb
	@mv $(STUDENT).partial $(STUDENT)
	@echo "the student edition is in $(STUDENT)/"

slides: $(READY) ## one deck for each notebook in slides/; they need a network when they are shown
	$(PY) -m jupyter nbconvert --log-level WARN --to slides --output-dir $(SLIDES) --SlidesExporter.reveal_scroll=True \
	  --TagRemovePreprocessor.enabled=True --TagRemovePreprocessor.remove_input_tags=hide-input \
	  --TagRemovePreprocessor.remove_input_tags=hide-code-on-slide notebooks/[0-9][0-9]_*.ipynb

test: $(READY) browser ## style, unit tests, and every notebook at the smoke preset
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

browser:
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null \
	  || { echo "Installing Chromium for the tests in a browser ..."; apt-get update -qq && apt-get install -qq -y chromium >/dev/null; } \
	  || echo "Chromium could not be installed; the tests in a browser will be skipped"

bench: $(READY) ## speed side by side, and the notebooks' time and memory, into study/
	$(PY) -m pip install --quiet --disable-pip-version-check -r tests/benchmarks/requirements.txt
	$(PY) tests/benchmarks/bench.py
	$(PY) tests/benchmarks/whole_series.py

bench-gpu: $(READY) ## speed and memory on an NVIDIA GPU into study/bench_gpu.md, meant for less than eight minutes on an H100
	$(PY) -m pip install --quiet --disable-pip-version-check -r tests/benchmarks/requirements.txt
	$(PY) tests/benchmarks/gpu.py

study: $(READY) ## gate, weights, comparison, conditions on the prepared data sets; tables and findings in runs/study/SCALE
	$(PY) -m study run --scale $(SCALE) --out $(TABLES) $(OPTIONS)
	$(PY) -m study report --out $(TABLES)

$(READY): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed; name one with: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "Setting up .venv (PyTorch is large: some minutes the first time) ..."
	@$(PYTHON) -m venv .venv
	@$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $(READY)
