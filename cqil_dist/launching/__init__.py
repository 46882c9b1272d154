"""Brings a model up on a cluster and takes it down again: config, placement, actors, client."""
