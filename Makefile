# `make help` lists what there is. Everything happens in .venv, made by `make install`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROTO_VENV := .venv-protos
WORKERS ?= 2
SEEDS ?= 200
export GLOO_SOCKET_IFNAME := lo

.PHONY: help install demo test bad-input test-etcd containers netns hosts check bench soak protos protos-check docs clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

install: $(VENV)/.installed ## make .venv with Paramesh in it (editable) and what tests need

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,examples]'
	@touch $@

demo: install ## a coordinator, 2 servers and 2 workers train handwritten digits
	$(BIN)/ps-run --servers 2 --workers 2 examples/digits.py

test: install ## the whole suite, under 12 minutes on two cores
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests -m 'not soak'

bad-input: install ## the 73 rows of the bad-input matrix on real processes, as a table: input, expected, got
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal tests --bad-input

test-etcd: install ## the tests of several coordinators on a real etcd; fails where there is none
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests -m etcd

containers: install ## images, and the scenarios on several hosts, on docker compose; brings an engine where there is none
	$(BIN)/python -m pytest tests/containers --backend compose -m 'soak or not soak'

netns: install ## the same scenarios on network namespaces (root)
	$(BIN)/python -m pytest tests/containers --backend netns -m 'soak or not soak'

hosts: install ## those of them that need no wires, on processes
	$(BIN)/python -m pytest tests/containers --backend processes

check: install protos-check ## ruff, mypy strict, import-linter, proto drift
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: install ## measure, beside the machine's limits, in one run
	$(BIN)/python -m benchmarks dense

soak: install ## the long tests
	$(BIN)/python -m pytest tests -m soak --timeout 3600

sim: install ## the simulation: SEEDS=2000 runs so many, SEED=17 replays one (REPLICAS=2|3, SCENARIO=name, FIRST=n)
	$(BIN)/python -m tests.simulation $(if $(SEED),--seed $(SEED),--seeds $(SEEDS) --jobs $(WORKERS)) \
		$(if $(REPLICAS),--replicas $(REPLICAS)) $(if $(SCENARIO),--scenario '$(SCENARIO)') $(if $(FIRST),--first $(FIRST))

$(PROTO_VENV)/.installed: tools/protos-requirements.txt
	$(PYTHON) -m venv $(PROTO_VENV)
	$(PROTO_VENV)/bin/python -m pip install -q -r tools/protos-requirements.txt
	@touch $@

protos: $(PROTO_VENV)/.installed ## generate client/paramesh/v1 from protos/
	$(PROTO_VENV)/bin/python tools/gen_protos.py

protos-check: $(PROTO_VENV)/.installed ## fail if the generated code differs from protos/
	$(PROTO_VENV)/bin/python tools/gen_protos.py --check

docs: install ## the API reference, into site/
	$(BIN)/pdoc -o site paramesh

clean: ## remove what make made
	rm -rf $(VENV) $(PROTO_VENV) site dist build
