"""A few of the trials of tests/stress, which runs them by the hundred."""

import importlib

import pytest

SEED = 0
FEW = [("kills", 4), ("signals", 6), ("access", 12), ("soak", 15)]
FEW += [("damage", 20), ("configs", 46), ("checkpoints", 20), ("pickles", 5)]
FEW += [("faults", 24), ("disk_full", 4)]
"""Modules, and how many of their trials run here."""


@pytest.mark.parametrize(("name", "count"), FEW)
def test_a_few_trials_all_end_well(name, count):
    failures = importlib.import_module(f"tests.stress.{name}").check(count, SEED)
    assert failures == [], f"with seed {SEED}"
