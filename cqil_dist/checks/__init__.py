"""Checks that the runtime is exact (`cqil verify`) and that a launch would work (`cqil doctor`)."""
