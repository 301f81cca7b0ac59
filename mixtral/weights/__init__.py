"""Weights on disk: the names and layouts that the ecosystem uses."""
