"""Layers, one family a file: forward function, hand-written rule, equations and initialiser side by side."""

from funcprop.public_names import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
