# Everything a person or CI runs. The environment lives in .venv; nothing outside this folder is touched.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test check audit audit-if-served trials faults bench airflow-test cluster-up cluster-down clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "make %-13s %s\n", $$1, $$2}'

install: $(STAMP)  ## create .venv and install everything the project and its tests need

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else f"Textsweep needs Python 3.11 or newer, {sys.executable} is {v.major}.{v.minor}; name another one: make PYTHON=/path/to/python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "python venv is missing; on Debian: apt-get install python3-venv"; exit 1; }
	@echo "installing into $(VENV): torch, ray, transformers and friends; a few minutes on a fresh machine"
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $(STAMP)

demo: install  ## fine-tune a real encoder and score an S3 archive, all on this machine, in minutes
	@$(BIN)/python -m jobs.demo

# A file's tests stay in one process, with an S3 server and a Ray of its own. The longest files first: both end together.
test: install  ## the whole test suite, ruff and mypy included, in two processes; one file: .venv/bin/python -m pytest FILE
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests/faults tests/integration tests/unit

check: install  ## ruff and strict mypy; known vulnerabilities where pypi.org answers
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(MAKE) --no-print-directory audit-if-served

# The version that PyPI's documentation shows this answer of: a mirror that knows nothing against it has no advisories.
ADVISORIES ?= https://pypi.org/pypi/Django/3.0.2/json

# check must work without the internet.
audit-if-served: install
	@if timeout 10 $(BIN)/python -c 'import json, sys, urllib.request as r; sys.exit(not json.load(r.urlopen(sys.argv[1], timeout=5))["vulnerabilities"])' $(ADVISORIES) 2> /dev/null; \
	then $(MAKE) --no-print-directory audit; else echo "not audited: no advisories at $(ADVISORIES)"; fi

# --strict: an index without advisories answers "could not be audited" for every package, and that is no pass. In an environment
# of its own, since it brings 30 packages.
audit: install  ## known vulnerabilities of the installed packages; needs pypi.org
	@test -x $(VENV)/audit/bin/pip-audit || { $(PYTHON) -m venv $(VENV)/audit && $(VENV)/audit/bin/pip install --quiet --disable-pip-version-check pip-audit; }
	@$(BIN)/python -m pip freeze --exclude-editable > $(VENV)/installed.txt
	@$(VENV)/audit/bin/pip-audit --strict --no-deps --disable-pip --requirement $(VENV)/installed.txt

trials: install  ## the long runs: real data, clusters, and everything that can go wrong, once each
	@$(BIN)/python -m pytest -m trial -s tests/integration tests/faults

faults: install  ## everything that can go wrong, SEEDS times each (default 1), written to faults.jsonl: hours for many
	@SEEDS=$(or $(SEEDS),1) FIRST_SEED=$(or $(FIRST_SEED),0) FAULTS_LOG=faults.jsonl $(BIN)/python -m pytest -m trial tests/faults

bench: install  ## how fast it is on this machine, beside what else one could run; written to bench.json
	@$(BIN)/python -m tests.benchmarks.ladder --seconds 1 --rows 2000 --peers --json bench.json

# Airflow in an environment of its own: its packages and ours could not agree.
airflow-test: install  ## run the DAGs in a real Airflow on a real Ray head: .venv-airflow, some 20 minutes
	@test -x .venv-airflow/bin/airflow || { $(PYTHON) -m venv .venv-airflow && .venv-airflow/bin/pip install --quiet --disable-pip-version-check -c cluster/airflow/constraints.txt apache-airflow==3.3.2; }
	@$(BIN)/python -m pytest -m 'trial or not trial' -s tests/integration/test_airflow.py

cluster-up: install  ## a Ray cluster of NODES nodes (default 3) and an S3 server on this machine, to try jobs.submit on
	@$(BIN)/python cluster/local/cluster.py up --nodes $(or $(NODES),3)

cluster-down:  ## end that cluster
	@$(BIN)/python cluster/local/cluster.py down

clean:  ## remove the environment and the demo's files
	rm -rf $(VENV) .venv-airflow demo
