"""Rules for JAX's own primitives, one family a file; `RULES` maps the primitive's name to its rule."""

from funcprop.primitives import elementwise

RULES = {**elementwise.RULES}
