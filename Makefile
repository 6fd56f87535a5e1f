# make quickstart   trains an encoder-decoder and its baseline, compares and samples them (minutes on two CPU cores)
# make test         lint and tests, what CI runs
# Both create .venv first. Another Python: make PYTHON=python3.12 quickstart
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
.PHONY: quickstart test install
.DELETE_ON_ERROR:

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[all]"
	touch $@

quickstart: out/quickstart/summary.json out/quickstart_baseline/summary.json
	$(RUN) compare.py out/quickstart out/quickstart_baseline --plot=out/quickstart_comparison
	@echo "--- the encoder-decoder:"
	$(RUN) sample.py out/quickstart --prompt="def " --max_new_tokens=400 --temperature=0.7
	@echo "--- the decoder-only baseline:"
	$(RUN) sample.py out/quickstart_baseline --prompt="def " --max_new_tokens=400 --temperature=0.7
	@echo "--- the table is above, its plot is out/quickstart_comparison.png"

# an interrupted quickstart goes on where it stopped
out/%/summary.json: $(VENV)/.installed
	$(RUN) train.py config/$*.py --out_dir=out/$* $$(test -d out/$*/last && echo --resume || echo --overwrite)

test: $(VENV)/.installed
	$(RUN) -m ruff check .
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 --durations=10
