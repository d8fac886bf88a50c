"""A linear map that knows its own transpose, as one primitive: the tangent map of a rule.

    tangent    ẏ = pushforward(r, ẋ)        the primitive: linear in ẋ
    cotangent  x̄ = pullback(r, ȳ)           its transpose: the hand-written backward

It is evaluated by the rule's own `jvp`, or by the transpose of the pullback; transposed it is the pullback.
Its derivative with respect to the residuals is that of these programs by ordinary autodiff. Under `vmap` it
is a linear map again, whose pullback never makes a batch of parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from funcprop import _jax

Arrays = list[Any]


@dataclass(frozen=True, eq=False)
class LinearMap:
    """A linear map with residuals, given by its transpose (and by itself, where a rule has a jvp).

    `pullback(residuals, cotangents) -> cotangents of the inputs`; `results` are the types of the results.
    """

    pullback: Callable[[Arrays, Arrays], Arrays]
    custom_pushforward: Callable[[Arrays, Arrays], Arrays] | None
    results: tuple[Any, ...]

    def pushforward(self, residuals: Arrays, tangents: Arrays) -> Arrays:
        """The map itself: the rule's jvp, or the transpose of the pullback."""
        if self.custom_pushforward is not None:
            return self.custom_pushforward(residuals, tangents)
        return self.partial_pushforward(residuals, tangents, list(range(len(tangents))))

    def partial_pushforward(self, residuals: Arrays, tangents: Arrays, which: Sequence[int]) -> Arrays:
        """The map with all inputs zero but those in `which`, whose tangents are given."""

        def pullback(cotangents: Arrays) -> Arrays:
            all_inputs = self.pullback(residuals, cotangents)
            return [all_inputs[i] for i in which]

        return list(jax.linear_transpose(pullback, list(self.results))(list(tangents))[0])

    def __repr__(self) -> str:
        return "LinearMap"


def _linear_call(*operands: Any, linear: LinearMap, residuals: int) -> Arrays:
    return linear.pushforward(list(operands[:residuals]), list(operands[residuals:]))


def _linear_abstract(*operands: Any, linear: LinearMap, residuals: int) -> Arrays:
    # The map is traced only where forward mode really evaluates it; reverse mode never does.
    return list(linear.results)


def _linear_jvp(primals: Any, tangents: Any, *, linear: LinearMap, residuals: int) -> Any:
    saved, inputs = list(primals[:residuals]), list(primals[residuals:])
    saved_dots, input_dots = tangents[:residuals], tangents[residuals:]
    bind = partial(linear_p.bind, linear=linear, residuals=residuals)
    results = bind(*saved, *inputs)
    terms = []
    if not all(type(t) is _jax.Zero for t in input_dots):
        terms.append(bind(*saved, *map(_jax.instantiate_zeros, input_dots)))
    moving = [i for i, t in enumerate(saved_dots) if type(t) is not _jax.Zero]
    if moving:

        def of_residuals(*values: Any) -> Arrays:
            full = list(saved)
            for i, value in zip(moving, values, strict=True):
                full[i] = value
            return linear.pushforward(full, inputs)

        terms.append(jax.jvp(of_residuals, [saved[i] for i in moving], [saved_dots[i] for i in moving])[1])
    return results, [sum(parts[1:], start=parts[0]) for parts in zip(*terms, strict=True)]


def _linear_transpose(cotangents: Any, *operands: Any, linear: LinearMap, residuals: int) -> Arrays:
    cts = [_jax.instantiate_zeros(ct) for ct in cotangents]
    return [None] * residuals + list(linear.pullback(list(operands[:residuals]), cts))


def _linear_batch(axis: Any, operands: Any, dims: Any, *, linear: LinearMap, residuals: int) -> Any:
    """Batch the map and its transpose.

    An input that is shared by the batch (a parameter) receives the sum of the examples' cotangents. The sum
    is not taken over a batch of parameter-sized cotangents: it is the transpose of the batched map of that
    one input, which JAX contracts over the batch.
    """
    saved_dims, input_dims = list(dims[:residuals]), list(dims[residuals:])
    vmap = partial(jax.vmap, axis_size=axis.size, axis_name=axis.name, spmd_axis_name=axis.spmd_name)
    if all(dim is None for dim in dims):
        # An operator that does not depend on the example (weight decay) is the same for all; it is computed
        # once, inside `vmap` all the same because a rule may use the axis by its name.
        once = partial(vmap, in_axes=None, out_axes=None)
        unbatched = LinearMap(once(linear.pullback), once(linear.pushforward), linear.results)
        return linear_p.bind(*operands, linear=unbatched, residuals=residuals), [None] * len(linear.results)
    mapped = [i for i, dim in enumerate(input_dims) if dim is not None]
    shared = [i for i, dim in enumerate(input_dims) if dim is None]
    input_avals = [jax.typeof(operand).to_tangent_aval() for operand in operands[residuals:]]

    def pushforward(saved: Arrays, tangents: Arrays) -> Arrays:
        return vmap(linear.pushforward, in_axes=(saved_dims, input_dims))(saved, tangents)

    def pullback(saved: Arrays, cotangents: Arrays) -> Arrays:
        found: dict[int, Any] = {}
        if mapped:

            def of_mapped(saved: Arrays, cts: Arrays) -> Arrays:
                all_inputs = linear.pullback(saved, cts)
                return [all_inputs[i] for i in mapped]

            out_axes = [input_dims[i] for i in mapped]
            batched = vmap(of_mapped, in_axes=(saved_dims, 0), out_axes=out_axes)(saved, cotangents)
            found.update(zip(mapped, batched, strict=True))
        if shared:

            def of_shared(tangents: Arrays) -> Arrays:
                each = partial(linear.partial_pushforward, tangents=tangents, which=shared)
                if not any(dim is not None for dim in saved_dims):
                    return [jax.numpy.broadcast_to(y, (axis.size, *y.shape)) for y in each(saved)]
                return vmap(each, in_axes=(saved_dims,))(saved)

            summed = jax.linear_transpose(of_shared, [input_avals[i] for i in shared])(list(cotangents))[0]
            found.update(zip(shared, summed, strict=True))
        return [found[i] for i in range(len(input_dims))]

    results = jax.eval_shape(pushforward, list(operands[:residuals]), list(operands[residuals:]))
    batched = LinearMap(pullback, pushforward, tuple(jax.typeof(y) for y in results))
    return linear_p.bind(*operands, linear=batched, residuals=residuals), [0] * len(results)


linear_p = _jax.define_primitive(
    "funcprop_linear",
    call=_linear_call,
    abstract=_linear_abstract,
    jvp=_linear_jvp,
    transpose=_linear_transpose,
    batch=_linear_batch,
)


def linear_body(eqn: Any) -> Any | None:
    """Trace what the tangent map of a rule computes, as a jaxpr; None for another equation."""
    if eqn.primitive is not linear_p:
        return None
    body = jax.make_jaxpr(partial(_linear_call, **eqn.params))(*[v.aval for v in eqn.invars])
    return _jax.inlined(body)
