# make demo         set up .venv and run the main job on the phantoms that medray ships, in three minutes
# make test         set up and run every test
# make check        ruff, its formatter and mypy
# make bench        every benchmark at full size (hours); make bench-quick: the same paths in minutes
# make bench-peers  nnU-Net and the others that we are measured beside, in an environment of their own
# A second call of any reuses what is there. PYTHON=python3.12 chooses the interpreter.

PYTHON ?= python3
VENV   := .venv
PEERS  := .venv-peers
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test check bench bench-quick bench-peers clean

demo: $(READY)
	@if [ -e runs/demo/study.db ]; then $(BIN)/medray tune --resume runs/demo; \
	else $(BIN)/medray tune search_spaces/demo.yaml; fi

# These share nothing, take one core each, and run side by side; the others have one Ray and the machine to themselves.
ALONGSIDE := tests/unit tests/integration/onnx tests/integration/test_small_set.py

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest $(ALONGSIDE) --numprocesses auto --dist loadfile
	$(BIN)/pytest tests/integration tests/e2e $(addprefix --ignore=,$(filter-out tests/unit,$(ALONGSIDE)))

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m benchmarks all

bench-quick: $(READY)
	$(BIN)/python -m benchmarks all --quick

bench-peers: $(PEERS)/.ready

clean:
	rm -rf $(VENV) $(PEERS) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

# The stamp is written last: an interrupted set-up is taken up again.
$(READY): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "medray needs Python 3.11 or newer; choose one with: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing the pinned environment into $(VENV) (several GB the first time) ..."
	@$(call install,$(VENV),-c constraints.txt -e '.[dev]')
	@touch $@

$(PEERS)/.ready: benchmarks/peers.txt
	@test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	@$(call install,$(PEERS),-r benchmarks/peers.txt)
	@touch $@

# uv is several times faster; pip knows every registry set-up of the machine, so it has the last word. Bytecode is compiled
# once, here: where it isn't, every process compiles torch, monai and Ray anew, 20 s of each start.
define install
{ $(1)/bin/python -m pip install --quiet --disable-pip-version-check uv \
  && $(1)/bin/uv pip install --quiet --compile-bytecode --python $(1)/bin/python $(2); } \
  || $(1)/bin/python -m pip install --quiet --disable-pip-version-check $(2)
endef
