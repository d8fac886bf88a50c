"""What a program holds in memory: predicted from its jaxpr, measured on the compiled program."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
