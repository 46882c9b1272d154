"""Finds plans: what groups cost by themselves, and the best plans of each serial depth."""
