"""Models as pure functions of parameter pytrees: combinators, and the chapter's own model."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
