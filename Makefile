# Everything here sets itself up: a fresh clone with Python 3.11+ and make is enough.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS := 1

KATEX := src/lossary/site/static/vendor/katex/katex.min.js

.PHONY: help venv compare serve site test quick lint bench

help:
	@echo "make compare   compare published methods on a real, imbalanced data set (set-up included)"
	@echo "make serve     the catalogue and the comparison as pages, on this machine"
	@echo "make site      the catalogue as static pages, in public/"
	@echo "make test      lint, types and every test"
	@echo "make quick PAPER=polyloss   one paper's tests"
	@echo "make bench     measure speed against the peers and write docs/performance.md"

venv: .venv/.done

.venv/.done: pyproject.toml constraints.txt hatch_build.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "lossary needs Python 3.11 or newer; name one with make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv .venv || { echo "no venv module: apt-get install python3-venv"; exit 1; }
	@echo "installing into .venv (a few minutes the first time)"
	@$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch hatchling editables
	@$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[dev]"
	@touch $@

compare: venv
	@$(BIN)/lossary compare red-wine

# Equations are set by KaTeX, from npm; without npm, pages show their source.
$(KATEX): | venv
	@$(BIN)/python -m lossary.site.vendor || true

serve: venv $(KATEX)
	@$(BIN)/lossary serve

site: venv $(KATEX)
	@$(BIN)/lossary build-site public

test: lint $(KATEX)
	$(BIN)/python -m pytest -n auto -q

quick: venv
	@test -n "$(PAPER)" || { echo "name a paper: make quick PAPER=polyloss"; exit 2; }
	$(BIN)/python -m pytest -q --paper $(PAPER)

lint: venv
	@$(BIN)/ruff check -q . && $(BIN)/ruff format -q --check . && $(BIN)/mypy --no-error-summary

# Peers that only benchmarks meet. The last two ask for torchvision, without which what is timed works too.
.venv/.peers: .venv/.done
	@$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt \
		kornia==0.9.0 monai==1.6.1 pytorch-metric-learning==2.9.0
	@$(BIN)/pip install -q --disable-pip-version-check --no-deps timm==1.0.31 pytorch-ood==0.4.0
	@touch $@

bench: .venv/.peers
	$(BIN)/python -m benchmarks
