"""The arithmetic of a decoder: parts, caches, weights and their reading; never imports Ray."""
