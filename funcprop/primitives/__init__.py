"""Rules for JAX's own primitives, one family a file; `RULES` maps the primitive's name to its rule."""

from funcprop.primitives import elementwise
from funcprop.registry import OperatorKey, Rule

RULES: dict[OperatorKey, Rule] = {**elementwise.RULES}
