"""Backpropagation, opened up: hand-written backward rules for any JAX function, both sweeps in the open."""

from importlib.metadata import version

from funcprop import notebook as _notebook  # noqa: F401
from funcprop.public_names import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
__version__ = version("funcprop")
__all__ += ["__version__"]
