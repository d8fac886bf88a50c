"""Backpropagation, opened up: hand-written backward rules for any JAX function, both sweeps in the open."""

from importlib.metadata import version

import lazy_loader

from funcprop import notebook as _notebook  # noqa: F401

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = version("funcprop")
__all__ += ["__version__"]
