"""Softmax cross-entropy, recognised by its derivatives: a loss of the output `o` of one example

    ℓ(o) = Σ_r w_r log Σ_c exp(a_rc) + linear in o,        a = o + constants

has the Hessian `Σ_r w_r (diag(p_r) − p_r p_rᵀ)`, `p = softmax(a)`. The sums of exponentials are looked for in
the loss's jaxpr. That all else is linear is seen by its tangent, which then reads neither `o` nor the
logarithms; so it does not matter how labels, weights, masks, smoothing and means are written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcprop import _jax
from funcprop.program.facts import keeps_order
from funcprop.program.layer_calls import without_marks
from funcprop.program.merged import merged
from funcprop.program.program import Program

# With more classes, one sweep less is no gain.
_MOST_LABELS = 1024


@dataclass(frozen=True, eq=False)
class CrossEntropyForm:
    """A loss in this form: `before` computes `a` and the logarithms, `after` the loss of all these."""

    program: Program
    before: Any
    after: Any

    @property
    def shape(self) -> tuple[int, int]:
        """The numbers of rows and classes."""
        *rows, classes = self.before.outvars[0].aval.shape
        return int(np.prod(rows, dtype=int)), classes

    def logits_and_weights(self, output: Any, y: Any) -> tuple[Any, Any]:
        """Compute `a[r, c]` and `w[r]`."""
        given = [*self.program.constants, *jax.tree.leaves((output, y))]
        a, *logarithms = _jax.evaluate(self.before, (), given)
        weights = jax.grad(lambda z: _jax.evaluate(self.after, (), [*given, *z])[0])(logarithms)
        return a.reshape(self.shape), sum(w.reshape(-1) for w in weights).astype(a.dtype)

    def picks_label(self) -> bool:
        """Decide whether it is `log Σ_c exp(a_c) − o_y`, of one row and an integer `y`: try every label."""
        inputs, classes = self.after.invars, self.shape[1]
        label = self.program.jaxpr.invars[-1].aval
        single = not self.program.constants and len(self.program.jaxpr.invars) == 2 and not label.shape
        integer = jnp.issubdtype(label.dtype, jnp.integer)
        if not (single and integer and self.shape[0] == 1 and classes <= _MOST_LABELS):
            return False

        def linear(label: Any) -> Any:
            o, _, *z = (jnp.zeros(v.aval.shape, v.aval.dtype) for v in inputs)
            return jax.grad(lambda o, z: _jax.evaluate(self.after, (), [o, label, *z])[0], (0, 1))(o, z)

        # −1 is the last class by numpy's convention; to `one_hot` it is none.
        labels = np.arange(-jnp.issubdtype(label.dtype, jnp.signedinteger), classes).astype(label.dtype)
        with jax.ensure_compile_time_eval():
            of_output, weights = Program.of(jax.vmap(linear), labels).compiled(labels)
            picked = np.asarray(of_output, float).reshape(-1, classes)
            weights = sum(np.asarray(w, float).reshape(len(labels), -1).sum(1) for w in weights)
        return np.array_equal(picked, -np.eye(classes)[labels % classes]) and bool(np.all(weights == 1))


def cross_entropy_form(loss: Callable[[Any, Any], Any], output: Any, y: Any) -> CrossEntropyForm | None:
    """Find the form of a loss; its output is a single array with the classes last. None if it has another."""
    leaves, tree = jax.tree.flatten(output)
    if len(leaves) != 1 or not leaves[0].ndim or leaves[0].shape[-1] < 2:
        return None
    program = Program.of(lambda o, y: loss(jax.tree.unflatten(tree, [o]), y), leaves[0], y)
    jaxpr = merged(without_marks(_jax.open_jaxpr(_jax.inlined(program.jaxpr))))
    o = len(program.constants)
    found = {eqn.outvars[0]: a for eqn in jaxpr.eqns if (a := _exponents(eqn, jaxpr)) is not None}
    if len(set(found.values())) != 1:
        return None
    (a,), logarithms = set(found.values()), list(found)
    before = _part(jaxpr, [a, *logarithms])
    after = _part(jaxpr, jaxpr.outvars, logarithms)
    smooth = [o, *range(len(jaxpr.invars), len(after.invars))]
    if not _is_output(_part(jaxpr, [a]), o) or _tangent(after, smooth)[1].intersection(smooth):
        return None
    return CrossEntropyForm(program, before, after)


def _exponents(eqn: Any, jaxpr: Any) -> Any:
    """Find `a`, if an equation is `log Σ_c exp(a_rc)` with the sum over the last axis."""
    maker = {v: made for made in jaxpr.eqns for v in made.outvars}

    def behind(eqn: Any) -> Any:
        return None if isinstance(eqn.invars[0], _jax.Literal) else maker.get(eqn.invars[0])

    total = behind(eqn) if eqn.primitive.name == "log" else None
    while total is not None and (total.primitive.name == "abs" or keeps_order(total)):
        total = behind(total)
    if total is None or total.primitive.name != "reduce_sum":
        return None
    exp = behind(total)
    if exp is None or exp.primitive.name != "exp" or total.params["axes"] != (exp.outvars[0].aval.ndim - 1,):
        return None
    return exp.invars[0]


def _part(jaxpr: Any, results: Sequence[Any], given: Sequence[Any] = ()) -> Any:
    """Cut results out of a jaxpr, as a jaxpr of its inputs and of variables that are given."""
    eqns = _jax.needed_equations(jaxpr.eqns, results, given)
    return _jax.jaxpr_of(eqns, [*jaxpr.invars, *given], results, "part")


def _tangent(jaxpr: Any, smooth: Sequence[int]) -> tuple[list[Any], set[int]]:
    """Trace the first result's tangent: its equations, and the inputs they read, values and then tangents."""
    avals = [v.aval for v in jaxpr.invars]

    def tangent(values: Sequence[Any], tangents: Sequence[Any]) -> Any:
        def of_smooth(*at: Any) -> Any:
            moved = dict(zip(smooth, at, strict=True))
            return _jax.evaluate(jaxpr, (), [moved.get(i, v) for i, v in enumerate(values)])[0]

        return jax.jvp(of_smooth, [values[i] for i in smooth], list(tangents))[1]

    traced = jax.make_jaxpr(tangent)(avals, [avals[i] for i in smooth])
    opened, constants = _jax.with_constants_as_inputs(_jax.inlined(traced))
    pruned, read = _jax.without_unread_inputs(opened, [False] * len(opened.invars))
    return list(pruned.eqns), {i for i, kept in enumerate(read[len(constants) :]) if kept}


def _is_output(jaxpr: Any, o: int) -> bool:
    """Decide whether a result is input `o` and constants added; axes before the last may be others."""
    (a,), output = jaxpr.outvars, jaxpr.invars[o]
    if a.aval.shape[-1] != output.aval.shape[-1] or a.aval.size != output.aval.size:
        return False
    eqns, read = _tangent(jaxpr, [o])
    return read == {len(jaxpr.invars)} and all(map(keeps_order, eqns))
