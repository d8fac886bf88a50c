"""The built-in rule sets.

* `handwritten`: every rule of this library.
* `default`: only the rules that were measured to win on the running backend, or that cannot lose.
* `autodiff`: none; every operator is differentiated by JAX.

`PATTERNS` are what the rewrite recognises as one operator though it is several, the larger first.
"""

from funcprop import primitives
from funcprop.layers import activation, fused_pooling
from funcprop.recognition import Pattern
from funcprop.registry import RuleSet

handwritten = RuleSet("handwritten", primitives.RULES, own=True)
default = RuleSet("default", primitives.RULES, own=True, measured=True)
autodiff = RuleSet("autodiff")

PATTERNS: tuple[Pattern, ...] = (*fused_pooling.PATTERNS, *activation.PATTERNS)
