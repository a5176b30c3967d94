.PHONY: install lint format test test-all docs

install:
	pip install -e ".[dev]"

lint:
	ruff check . && ruff format --check . && mypy

format:
	ruff check --fix . && ruff format .

test:
	python -m pytest -m "not slow" -n 2

test-all:
	python -m pytest -n auto

docs:
	python -m tests.reference
