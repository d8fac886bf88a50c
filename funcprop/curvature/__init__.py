"""Curvature: second-order quantities of any JAX model, as linear operators on its parameters."""

from funcprop.public_names import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
