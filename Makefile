# Everything runs in .venv, made once. Another Python: `make PYTHON=python3.12 quickstart`.
PYTHON ?= python3
BIN := .venv/bin

# Where this is set, every process compiles all that it imports, which takes more than half of its start.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help quickstart test lint types tests browser notebooks soak bench gpu clean

help:
	@echo "make quickstart   install, run the grid configs/grids/quickstart.yaml, print its table"
	@echo "make test         install, then lint, types, tests (with doctests) and notebooks"
	@echo "make lint         ruff and the import contracts"
	@echo "make types        mypy"
	@echo "make tests        pytest, doctests included, and every strategy on a second device"
	@echo "make notebooks    execute every notebook"
	@echo "make soak         the long versions of the tests"
	@echo "make bench        training steps against a hand-written loop, on ViT-B/16 and a small ViT"
	@echo "make gpu          every strategy checked and measured on one GPU, in nine minutes; again to resume"
	@echo "make clean        remove caches and build output; .venv and results stay"

quickstart: .venv/installed
	$(BIN)/cl-bench grid configs/grids/quickstart.yaml
	$(BIN)/cl-bench report results/quickstart
	$(BIN)/cl-bench report results/quickstart --format html

# mypy keeps one core busy, so the browser is fetched meanwhile.
test: lint
	$(MAKE) -j 2 types browser
	$(MAKE) tests notebooks

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: .venv/installed-dev
	$(BIN)/mypy

tests: .venv/installed-dev browser
	$(BIN)/pytest -n 2 --dist worksteal --durations=10
	$(BIN)/pytest -n 2 tests/devices

# The page of a report is tested in a real browser. Without apt and root, those tests are skipped, with the reason.
browser:
	@if command -v chromedriver >/dev/null; then :; \
	elif command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
		echo "Installing Debian's chromium and chromium-driver, for the tests of the page."; \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
			apt-get install -yqq --no-install-recommends chromium chromium-driver >/dev/null; } \
			|| echo "They could not be installed; the tests of the page will be skipped."; \
	else echo "No chromedriver, and no apt as root to install it: the tests of the page will be skipped."; fi

notebooks: .venv/installed-dev
	$(BIN)/pytest -n 2 --nbmake notebooks

soak: .venv/installed-dev
	$(BIN)/pytest -m soak
	$(BIN)/pytest -m soak tests/devices
	rm -rf results/survey-rehearsal
	$(MAKE) gpu SIZE=rehearsal

bench: .venv/installed
	mkdir -p results/bench
	@echo "Rows go to results/bench/*.json, and the table with its findings to a .txt of the same name."
	$(BIN)/cl-bench bench --json > results/bench/vit_base_patch16_224.json 2> results/bench/vit_base_patch16_224.txt
	$(BIN)/cl-bench bench --backbone small --json > results/bench/small.json 2> results/bench/small.txt

# The rehearsal makes the same rows, small, on the CPU: make gpu SIZE=rehearsal
SIZE ?= full
DEVICE ?= $(if $(filter rehearsal,$(SIZE)),cpu,cuda)
gpu: .venv/installed
	$(BIN)/cl-bench survey results/survey-$(SIZE) --size $(SIZE) --device $(DEVICE)

clean:
	rm -rf .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis build dist *.egg-info
	find cl_bench strategies datamodules tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The two files mark what is installed, so a second call installs nothing; a change of pyproject.toml installs again.
# pip would compile every file of every package. The last command compiles what a run imports, so that the processes
# of a grid or of the tests, which start together, do not all do so.
define install
	@echo "Installing cl-bench$(1) into .venv; the first time takes a few minutes."
	$(BIN)/python -m pip install --no-compile -e '.$(1)'
	$(BIN)/cl-bench run ncm digits --print_protocol > /dev/null
endef

.venv/installed: pyproject.toml | $(BIN)/pip
	$(call install,)
	@touch $@

.venv/installed-dev: pyproject.toml | $(BIN)/pip
	$(call install,[dev])
	@touch .venv/installed $@

# pip comes last when an environment is made, so one that was interrupted is completed.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11, 4))' || { \
		echo "cl-bench needs Python 3.11.4 or newer, which $(PYTHON) is not: name one that is, as in make PYTHON=python3.12 $(MAKECMDGOALS)." >&2; \
		exit 1; }
	$(PYTHON) -m venv .venv
