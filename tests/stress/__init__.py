"""Stress trials of failures, by the hundred; the test suite runs a few of them.

`python -m tests.stress [NAME ...] [--count N] [--seed S]` runs them. Each module has a
function `check(count, seed)`, which runs `count` trials, prints a line on them and returns the
failures.
"""
