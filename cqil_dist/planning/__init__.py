"""How much faster, and how much worse: plans from measurement, and quality won back.

Works in one process on transformers models, whole sequences at a time; knows nothing of ranks' Ray
actors, sockets or requests.
"""
