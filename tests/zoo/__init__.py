"""A zoo of functions to differentiate: `ZOO[name].build() -> (fun, args)`.

`fun(params, *rest)` returns a scalar; `args` are pytrees of arrays and the gradient is taken with respect to
the first. Parameters are float64, so that two ways to compute a gradient agree to rounding, except in the
entries whose tolerance says otherwise. Nothing is built before it is asked for.
"""

from zoo import arrays, control, frameworks
from zoo.entry import Entry

ZOO: dict[str, Entry] = {
    entry.name: entry for family in (frameworks, arrays, control) for entry in family.FAMILY.entries
}
