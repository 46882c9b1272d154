"""Answers to "is it exact?" (`cqil verify`) and "would it start?" (`cqil doctor`)."""
