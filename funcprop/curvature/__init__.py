"""Curvature: second-order quantities of any JAX model, as linear operators on its parameters."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
