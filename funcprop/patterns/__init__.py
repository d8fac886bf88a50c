"""Layers that are recognised in foreign functions, each beside the pattern that finds it.

They are public as `fp.layers`. They stand below the rule sets, because the rewrite looks for them in every
function; the other layers stand above, and may use the rewrite.

`PATTERNS` are what the rewrite recognises as one operator though it is several, the larger first.
"""

from funcprop.patterns import activation, fused_pooling, softmax
from funcprop.patterns.recognition import Pattern

PATTERNS: tuple[Pattern, ...] = (*fused_pooling.PATTERNS, *activation.PATTERNS, *softmax.PATTERNS)
