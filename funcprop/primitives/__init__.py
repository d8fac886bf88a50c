"""Rules for JAX's own primitives, one family a file; `RULES` maps the primitive's name to its rule."""

from funcprop.primitives import elementwise
from funcprop.registry import Layer, Rule

RULES: dict[str | Layer, Rule] = {**elementwise.RULES}
