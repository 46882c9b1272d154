"""Measurements of latency and of services under load, behind `cqil bench`."""
