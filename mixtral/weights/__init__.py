"""Weights on disk: the names and layouts that the ecosystem uses."""

from mixtral.weights.files import WeightsError
from mixtral.weights.read import load, read

__all__ = ["WeightsError", "load", "read"]
