"""Training: minibatch stochastic gradient descent as pure functions, and data that needs no network."""

from funcprop.public_names import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
