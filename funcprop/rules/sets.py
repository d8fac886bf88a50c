"""The built-in rule sets.

* `handwritten`: every rule of this library.
* `default`: only the rules that were measured to win on the running backend, or that cannot lose.
* `autodiff`: none; every operator is differentiated by JAX.
"""

from funcprop.rules import primitives
from funcprop.rules.rule_set import RuleSet

handwritten = RuleSet("handwritten", primitives.RULES, own=True)
default = RuleSet("default", primitives.RULES, own=True, measured=True)
autodiff = RuleSet("autodiff")
