"""Recovering the quality that a plan costs: compensation by regression, and distillation."""
