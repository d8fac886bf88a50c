"""Is a hand-written rule right? Checks for the authors of rules, without any test framework.

`check_rule` holds one rule against autodiff, finite differences and its own forward mode, under every
transformation; `check_gradient` does the same for the gradient of a whole function.
"""

from funcprop.public_names import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
