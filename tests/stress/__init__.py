"""What holds when things go wrong: trials by the hundred, of which the tests run a few.

`python -m tests.stress [NAME ...] [--count N] [--seed S]` runs them. Each module has a
function `check(count, seed)`, which runs so many trials, prints a line on them and returns what
failed.
"""
