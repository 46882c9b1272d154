"""Measuring plans: the model in groups, calibration text, divergence from the original model."""
