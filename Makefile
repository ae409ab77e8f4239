# Each target sets up what it needs on a fresh machine: a virtual environment in .venv.
PYTHON ?= python3
VENV ?= .venv
TOOLS = pytest pytest-xdist hypothesis ruff mypy pandas-stubs types-tqdm playwright onnx onnxscript \
	onnxruntime nbclient ipykernel timm

.PHONY: demo test lint

demo: $(VENV)/ready
	$(VENV)/bin/python train_models.py --demo

test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses 2

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m pytest tests/test_layout.py  # sizes, order of imports

$(VENV)/ready: requirements.txt constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 is needed")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check \
		--requirement requirements.txt $(TOOLS) --constraint constraints.txt
	touch $@
