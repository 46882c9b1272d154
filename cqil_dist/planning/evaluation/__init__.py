"""Evaluating a plan beside the original model: perplexity and tasks, with confidence intervals."""
