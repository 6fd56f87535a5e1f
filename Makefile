# make quickstart   trains an encoder-decoder and its baseline, compares and samples them (minutes on two CPU cores)
# make table        trains what is missing of the eight rows of config/stdlib/ with three seeds, and compares them (hours)
# make test         lint and tests, what CI runs
# All create .venv first. Another Python: make PYTHON=python3.12 quickstart
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
.PHONY: quickstart table test install
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

ROWS := $(filter-out common,$(patsubst config/stdlib/%.py,%,$(wildcard config/stdlib/*.py)))
table: $(foreach row,$(ROWS),$(foreach seed,1 2 3,out/stdlib/$(row)_s$(seed)/summary.json))
	$(RUN) compare.py $(^D) --reference=baseline --output=out/stdlib/table.md --plot=out/stdlib/curves

# an interrupted run goes on where it stopped (last.old: it crashed as it saved); a finished one of the table stays as it is
out/stdlib/%/summary.json: | $(VENV)/.installed
	run=$*; $(RUN) train.py config/stdlib/$${run%_s*}.py --seed=$${run##*_s} --out_dir=out/stdlib/$* \
		$$(test -d out/stdlib/$*/last -o -d out/stdlib/$*/last.old && echo --resume || echo --overwrite)

out/%/summary.json: $(VENV)/.installed
	$(RUN) train.py config/$*.py --out_dir=out/$* $$(test -d out/$*/last -o -d out/$*/last.old && echo --resume || echo --overwrite)

test: $(VENV)/.installed
	$(RUN) -m ruff check .
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 --durations=10
