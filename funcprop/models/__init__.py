"""Models as pure functions of parameter pytrees: combinators, and the chapter's own model."""

from funcprop.public_names import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
