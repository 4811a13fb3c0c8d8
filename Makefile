# make quickstart   install, train a small detector on the embedded data set, evaluate it, draw what it sees
# make test         install if need be, run the test suite
# make test-all     the same with the long tests: builds, sanitizers, stress tests, exhaustive variants
# make docs         build the site of docs/ in output/site
# make clean        delete the virtual environment, the site and what was built; trainings in output/ stay
#
# VENV=folder   virtual environment to use, made if it is not there (default .venv)
# PYTHON=path   an interpreter to use as it is; nothing is installed into it
# BASE_PYTHON   what makes the virtual environment (default python3; 3.10 to 3.13)
# THREADS       CPU threads of the quickstart, processes of the tests (default 2)

BASE_PYTHON ?= python3
VENV ?= .venv
THREADS ?= 2
READY := $(VENV)/.dn_detr_d2_ready
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet
export OMP_NUM_THREADS = $(THREADS)

ifdef PYTHON
ENVIRONMENT := check-python
else
PYTHON := $(VENV)/bin/python
ENVIRONMENT := $(READY)
endif

.PHONY: quickstart test test-all lint docs environment check-python clean
quickstart: $(ENVIRONMENT)
	$(PYTHON) tools/quickstart.py

test: $(ENVIRONMENT)
	@echo "== Running the tests (about 10 minutes on two cores)"
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest tests -q -n $(THREADS) --dist loadfile --durations 40

test-all: $(ENVIRONMENT)
	@echo "== Running all tests, the long ones too"
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest tests -q -n $(THREADS) --dist loadfile --durations 40 -m "long or not long"

lint: $(ENVIRONMENT)
	$(PYTHON) -m ruff check . && $(PYTHON) -m ruff format --check . && $(PYTHON) -m codespell_lib

docs: $(ENVIRONMENT)
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --quiet
	@echo "site: output/site/index.html"

environment: $(ENVIRONMENT)

$(READY): requirements.txt setup.py pyproject.toml tools/install_detectron2.py $(wildcard csrc/* csrc/*/*)
	@echo "== Making the environment $(VENV) (7 GB, a few minutes; the next time it is there)"
	@mkdir -p $(VENV)
	@free=$$(df -Pk $(VENV) | awk 'NR == 2 {print int($$4 / 1000000)}'); test -x $(VENV)/bin/pip -o "$$free" -ge 10 || \
	  { echo "error: $(VENV) and what pip unpacks on the way need 10 GB, and $$free GB are free there"; exit 1; }
	test -x $(VENV)/bin/pip || $(BASE_PYTHON) -m venv $(VENV)
	@echo "== Installing the pinned requirements (requirements.txt)"
	$(PIP) --upgrade pip setuptools wheel
	$(PIP) -r requirements.txt
	$(PIP) --no-deps trackers==2.6.1
	@echo "== Installing Detectron2"
	$(VENV)/bin/python tools/install_detectron2.py
	@echo "== Installing this package, with its operators where there is a compiler (about a minute)"
	$(PIP) --no-build-isolation --no-deps -e .
	@cat dn_detr_d2/_build.txt
	@touch $@

check-python:
	@$(PYTHON) -c "import torch, torchvision, scipy, cv2, pytest, xdist, hypothesis, detectron2" || \
	  { echo "error: $(PYTHON) lacks the package named above; install requirements.txt and run tools/install_detectron2.py with it"; exit 1; }

clean:
	rm -rf $(VENV) output/site build *.egg-info
