"""A few trials of each module of tests/stress, which runs hundreds of them."""

import importlib

import pytest

SEED = 0
FEW = [("kills", 2), ("signals", 4), ("access", 9), ("soak", 9)]
FEW += [("damage", 20), ("configs", 23), ("checkpoints", 20), ("pickles", 5)]
FEW += [("faults", 9), ("disk_full", 2)]
"""Modules, and the number of their trials that run here."""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), FEW)
def test_few_stress_trials_succeed(name, count):
    failures = importlib.import_module(f"tests.stress.{name}").check(count, SEED)
    assert failures == [], f"with seed {SEED}"
