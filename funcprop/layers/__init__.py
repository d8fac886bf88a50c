"""Layers, one family a file: forward function, hand-written rule, equations and initialiser side by side."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
