"""Layers that are recognised in foreign functions, each beside the pattern that finds it.

They are public as `fp.layers`. They stand below the rule sets, because the rewrite looks for them in every
function; the other layers stand above, and may use the rewrite.

`PATTERNS` are what the rewrite recognises as one operator though it is several, the larger first.
"""

from typing import Any

import jax

from funcprop.rules.patterns import activation, fused_pooling, softmax
from funcprop.rules.patterns.recognition import Known, Pattern

PATTERNS: tuple[Pattern, ...] = (*fused_pooling.PATTERNS, *activation.PATTERNS, *softmax.PATTERNS)

# Those of JAX's functions with a derivative of their own (`jax.custom_jvp`) that a pattern may be of.
FUNCTIONS: tuple[Any, ...] = tuple(
    p.function for p in PATTERNS if isinstance(p, Known) and isinstance(p.function, jax.custom_jvp)
)
