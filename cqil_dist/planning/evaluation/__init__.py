"""How good a model is under a plan: perplexity and tasks, with intervals, beside the original."""
