"""Rules and equations for JAX's own primitives, one family a file.

`RULES` maps a primitive's name to its rule, `EQUATIONS` to its equations (those of the rules included).
"""

from collections.abc import Callable
from typing import Any

from funcprop.rules.primitives import (
    arithmetic,
    average_pooling,
    convolution,
    cumulative,
    elementwise,
    functions,
    indexing,
    linear_algebra,
    loops,
    pooling,
    product,
    reductions,
    slices,
)
from funcprop.rules.rule import Rule
from funcprop.rules.rule_set import OperatorKey

RULES: dict[OperatorKey, Rule] = {
    **elementwise.RULES,
    **product.RULES,
    **convolution.RULES,
    **pooling.RULES,
    **average_pooling.RULES,
    **reductions.RULES,
    **cumulative.RULES,
    **indexing.RULES,
    **loops.RULES,
}

EQUATIONS: dict[Any, Callable[..., Any]] = {
    **arithmetic.EQUATIONS,
    **{name: rule.equations for name, rule in RULES.items() if rule.equations is not None},
    **functions.EQUATIONS,
    **slices.EQUATIONS,
    **indexing.EQUATIONS,
    **linear_algebra.EQUATIONS,
}
