"""A graph too large for one device: its axes, layouts over a mesh, pipelines, and plans with a proof."""

from funcprop.public_names import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
