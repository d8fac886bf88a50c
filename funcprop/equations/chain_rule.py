"""One operator's part in the chain rule, computed by JAX alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from funcprop import _jax
from funcprop.equations.prod import prod
from funcprop.graph.graph import Operator
from funcprop.graph.references import has_references, run, with_new_references

# A Jacobian with more entries than this is not formed to evaluate `prod`, nor one of complex numbers, which
# would be that of their real and imaginary parts; the pullback is the same number.
_LARGEST_JACOBIAN = 1_000_000


def call_operator(op: Operator, inputs: Sequence[Any]) -> list[Any]:
    """The results of one operator."""
    return run(op, inputs, lambda jaxpr, values: _jax.evaluate(jaxpr, (), values))[0]


def pullback(
    op: Operator, inputs: Sequence[Any], active: Collection[str], results: Sequence[int]
) -> Callable[[Sequence[Any]], Mapping[str, Any]]:
    """The function from the cotangents of some results to those of the operator's `active` inputs, by name.

    All of these are differentiated together: an operator need not have a derivative by one of them alone.
    """
    pairs = list(zip(op.inputs, with_new_references(op, inputs), strict=True))
    wanted = {v.name: x for v, x in pairs if v.kind != "literal" and v.name in active}

    def of_wanted(values: Mapping[str, Any]) -> list[Any]:
        given = [x if v.kind == "literal" else values.get(v.name, x) for v, x in pairs]
        computed = _jax.evaluate(op.jaxpr, (), given)
        return [computed[i] for i in results]

    pull = jax.vjp(of_wanted, wanted)[1]
    return lambda cotangents: pull(list(cotangents))[0]


@dataclass(frozen=True)
class ChainTerm:
    """`prod(∂J/∂y, ∂y/∂x)` of one result of an operator and all uses of one input."""

    op: Operator
    result: int
    name: str
    active: Collection[str]

    def __call__(self, cotangent: Any, *inputs: Any) -> Any:
        """The cotangent of the input, from that of the result and all inputs of the operator."""
        pull = pullback(self.op, inputs, self.active, [self.result])
        pulled_back = pull([cotangent])[self.name]
        jacobian = self._jacobian(pull, cotangent, pulled_back)
        if jacobian is None:
            return pulled_back
        # Its zeros times an infinity would be NaN, in products that no autodiff forms.
        is_finite = jnp.all(jnp.isfinite(jacobian)) & jnp.all(jnp.isfinite(cotangent))
        product = prod(cotangent, jacobian, y_ndim=jnp.ndim(cotangent))
        return jnp.where(is_finite, product.astype(pulled_back.dtype), pulled_back)

    def _jacobian(self, pull: Callable[..., Any], cotangent: Any, like: Any) -> Any | None:
        """`∂y/∂x`, row by row; None where that is too large, complex, or cannot be mapped over rows."""
        is_complex = jnp.iscomplexobj(like) or jnp.iscomplexobj(cotangent)
        if is_complex or not 0 < like.size * cotangent.size <= _LARGEST_JACOBIAN:
            return None
        if self.op.jaxpr.effects or has_references(self.op):
            return None
        rows = jnp.eye(cotangent.size, dtype=cotangent.dtype).reshape(-1, *cotangent.shape)
        try:
            jacobian = jax.vmap(lambda row: pull([row])[self.name])(rows)
        except NotImplementedError:
            # JAX has no batching rule for the operator, such as a call of an exported function.
            return None
        return jacobian.reshape(*cotangent.shape, *like.shape)
