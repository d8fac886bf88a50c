"""What a program holds in memory: predicted from its jaxpr, measured on the compiled program."""

from funcprop.public_names import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
