"""Searching for plans: the cost of each group by itself, and the best plan of each serial depth."""
