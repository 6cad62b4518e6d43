# make quick   from a fresh clone to reports/quick: installs, trains, searches, fine-tunes, draws
# make test    the whole test suite
# make help    the rest

PYTHON ?= python3.11
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
# dvc runs `papermill` and `python` by name, so the environment's own must come first
export PATH := $(BIN):$(PATH)

.PHONY: help install images quick cifar10 cifar10-gpu compare published peers-digits peers-cifar10 test lint format lab clean

help:
	@echo "make quick     digits: baseline, search, fine-tuning, tables and figures (reports/quick)"
	@echo "make cifar10   the same for CIFAR-10 (days on a CPU; reports/cifar10)"
	@echo "make cifar10-gpu"
	@echo "               the full scale, for a GPU: four networks, four budgets, three seeds, CIFAR-100"
	@echo "make compare   the agents beside chance, CMA-ES and heuristics on CIFAR-10 (hours; reports/compare)"
	@echo "make published the search as published, of few episodes, on CIFAR-10 (hours; reports/published)"
	@echo "make peers-digits, make peers-cifar10"
	@echo "               methods of other papers under one protocol: minutes, and hours"
	@echo "make test      ruff, notebooks stripped, the whole test suite"
	@echo "make lab       JupyterLab in notebooks/"
	@echo "make format    format the code and strip the notebooks"
	@echo "make clean     remove the environment and unfinished runs"

install: $(VENV)/installed

# results of CIFAR-10 in git are of the images that they were made with: what is here is recorded first, so that DVC
# makes anew what rests on others
cifar10 cifar10-gpu compare published peers-cifar10: images

images: install
	@$(BIN)/python -m rlprune prepare cifar10

$(VENV)/installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not on PATH: install Python 3.11, or name one with make PYTHON=..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[pipeline,test]'
	@touch $@

quick cifar10 cifar10-gpu compare published peers-digits peers-cifar10: install
	@$(BIN)/python -m rlprune check
	$(BIN)/dvc repro $@
	@$(BIN)/python -m rlprune show $@

test: install lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: install
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --quiet --check .
	$(BIN)/nbstripout --verify notebooks/*.ipynb

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/nbstripout notebooks/*.ipynb

lab: install
	$(BIN)/jupyter lab notebooks

clean:
	rm -rf $(VENV) checkpoints executed/*.ipynb
