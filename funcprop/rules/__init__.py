"""Hand-written backward rules: the built-in sets, and how a function carries them.

* `handwritten`: every rule of this library.
* `default`: only the rules that were measured to win on the running backend, or that cannot lose.
* `autodiff`: none; every operator is differentiated by JAX.
"""

from funcprop.public_names import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
