"""Test networks, compare runs and arms, and write the tables."""
