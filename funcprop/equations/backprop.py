"""`fp.backprop(fun)(*args)`: run both sweeps and look at everything by name, line by line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from funcprop.equations.readable_lines import ReadableLines, where
from funcprop.graph.graph import aligned, shape_text
from funcprop.graph.objective import Argnums
from funcprop.graph.references import has_references
from funcprop.program.dtypes import promoting
from funcprop.rules.rule_set import RuleSet
from funcprop.sweeps.backprop import propagation_of
from funcprop.sweeps.propagation import Propagation, norm_text

# A line that is longer is told by its left-hand side.
_WIDEST = 52


def backprop(
    fun: Callable[..., Any], argnums: Argnums = 0, has_aux: bool = False, *, rules: RuleSet | None = None
) -> Callable[..., Propagation]:
    """Forward and backward propagation of a scalar function, with everything they compute by name.

    `backprop(fun, argnums, has_aux)(*args, **kwargs) -> Propagation`:

    * `.value`: what `fun` returns
    * `.gradient`: what `jax.grad` returns; a tuple over all arguments if `argnums` is None
    * `.values[name]`, `.gradients[name]`: every intermediate, and `∂J/∂` it, of the same shape
    * `.contributions[source, target]`: the part of a gradient that arrives by way of one variable
    * `.first_nonfinite()`: where the first infinity or NaN appears

    Names are those of the arguments, of `fp.name` and of named scopes (Flax modules); a suffix is enough
    where it is unique. It can be jitted.

    An nnx model among the arguments is differentiated by its `nnx.Param`s, `.gradient` is their state as
    `nnx.grad` returns it, and what the function changes in the model (batch statistics, random streams) is
    changed.

    Args:
        fun: returns a real scalar; with `has_aux`, a pair of it and auxiliary data.
        argnums: the arguments to differentiate with respect to, as in `jax.grad`; None for all that have a
            derivative.
        has_aux: as in `jax.grad`; the auxiliary data are `.aux`.
        rules: a rule set; `fp.rules.handwritten` if None.

    Raises:
        TypeError: `fun` does not return one real scalar, an argument at `argnums` has no derivative, or an
            argument is a shape.
        ValueError: there is no argument at a position in `argnums`.

    Reference: Zhang et al., *Dive into Deep Learning*, section 5.3.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> def loss(w, x):
        ...     z = fp.name(w * x, "z")
        ...     return fp.name(z**2, "L")
        >>> p = fp.backprop(loss)(3.0, 2.0)
        >>> print(float(p.values["z"]), float(p.gradients["z"]), float(p.gradients["w"]))
        6.0 12.0 24.0
    """
    run = propagation_of(fun, argnums, has_aux, rules=rules)
    return lambda *args, **kwargs: replace(run(*args, **kwargs), table=table)


def table(propagation: Propagation) -> str | None:
    """Every argument and line with its name in `.values`, shape and norms; None where there are no lines."""
    graph = propagation.graph
    if any(map(has_references, graph.operators)):
        return None
    with promoting():
        inputs = [v for v in graph.inputs if v.name in propagation.active]
        lines = ReadableLines(graph, graph.outputs[0], inputs)
        forward, _ = lines.sweeps()
        values = dict(propagation.tape.values)
        for line in forward:
            if line.key not in values:  # A part of an array, which the sweeps have no variable for.
                values[line.key] = line.forms[-1].evaluate(values)
    gradients = {**propagation.gradients, graph.outputs[0].name: 1.0}
    rows = [("line", "name", "shape", "‖value‖", "‖∂J/∂v‖")]
    given = [(lines.writer.symbols[v.name].text(), v.name) for v in graph.inputs]
    written = [(line.text() if len(line.text()) <= _WIDEST else line.left, line.key) for line in forward]
    for text, key in (*given, *written):
        gradient = norm_text(gradients[key]) if key in gradients else "-"
        name = key if key in propagation.tape.values else "-"
        rows.append((text, name, shape_text(jnp.shape(values[key])), norm_text(values[key]), gradient))
    told = where(lines.functions, {})
    return "\n".join([aligned(rows, {3, 4}), *(["where", *told] if told else [])])
