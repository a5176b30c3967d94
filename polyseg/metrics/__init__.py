"""Metrics, calibration, significance tests and rank stability, computed from arrays."""
