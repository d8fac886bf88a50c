"""The built-in rule sets.

* `handwritten`: every rule of this library.
* `default`: only the rules that were measured to win on the running backend, or that cannot lose.
* `autodiff`: none; every operator is differentiated by JAX.
"""

from funcprop.rules import primitives
from funcprop.rules.rule import RuleError
from funcprop.rules.rule_set import RuleSet

handwritten = RuleSet("handwritten", primitives.RULES, own=True)
default = RuleSet("default", primitives.RULES, own=True, measured=True)
autodiff = RuleSet("autodiff")


def chosen_rules(rules: RuleSet | None, otherwise: RuleSet = default) -> RuleSet:
    """The rule set that was passed, or the other one.

    Raises:
        RuleError: it is none.
    """
    if rules is not None and not isinstance(rules, RuleSet):
        raise RuleError(f"rules={rules!r} is not a rule set; pass `fp.rules.default` or another RuleSet.")
    return otherwise if rules is None else rules
