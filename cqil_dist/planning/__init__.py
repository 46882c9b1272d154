"""Finding plans by measurement, and recovering the quality that a plan costs.

Computes in one process on transformers models, whole sequences at a time; knows nothing of Ray
actors, sockets or requests.
"""
