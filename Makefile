# make demo   the whole story on this machine          make test     the test suite
# make teacher, make base                              rebuild the shipped checkpoints from their recipes
# make docs   the generated pages: docs/recipes.md, docs/api.md, the result tables of the READMEs
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install demo test lint docs teacher base clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "torch>=2.11,<2.14"
	$(BIN)/pip install --quiet -e ".[dev,tensorboard,endpoint,serving,math,workshop]"
	touch $@

demo: install
	$(BIN)/distill demo

test: install
	$(BIN)/python -m pytest -n auto

lint: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

docs: install
	$(BIN)/python -m distill.recipe_reference
	$(BIN)/python -m distill.api_reference
	$(BIN)/python -m distill.readme

teacher: install
	$(BIN)/distill run recipes/teacher.yaml
	$(BIN)/python -m distill.publish checkpoints/teacher-run checkpoints/teacher

base: install
	$(BIN)/distill run recipes/base.yaml
	$(BIN)/python -m distill.publish checkpoints/base-run checkpoints/base

clean:
	rm -rf $(VENV) build *.egg-info
