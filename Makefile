# Everything runs in ./.venv, which `make setup` makes; the other targets make it when it is not there.
PYTHON ?= python3
RAYLENS := .venv/bin/python -m raylens
STAMP := .venv/.installed

.PHONY: setup demo test check slow docs benchmarks scale

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

# The whole job on this machine: lenses, networks, tables. Run again, it does only what is missing.
demo: $(STAMP)
	$(RAYLENS) reproduce smoke --to demo

test: $(STAMP)
	.venv/bin/python -m pytest -q

# What takes minutes each: faults at scale, campaigns, the smoke recipe's promises.
slow: $(STAMP)
	.venv/bin/python -m pytest -q -m slow

check: $(STAMP)
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m mypy

# The documentation as a site, in site/; warnings are errors.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict --site-dir site

benchmarks: $(STAMP)
	.venv/bin/python benchmarks/simulate.py
	.venv/bin/python benchmarks/generate.py
	.venv/bin/python benchmarks/shards.py
	.venv/bin/python benchmarks/train.py
	.venv/bin/python benchmarks/tune.py

# Ten thousand, a hundred thousand and a million images: twelve minutes and 15 GB.
scale: $(STAMP)
	.venv/bin/python benchmarks/scale.py
