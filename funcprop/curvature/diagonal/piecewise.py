"""Where a function is piecewise affine in a parameter, so that its Gauss-Newton matrix is its Hessian there.

For a loss `L(f(θ))`, `∇²L = Jᵀ (∇²_f L) J + Σ_k (∂L/∂f_k) ∇²f_k`. If `f` is piecewise affine in one leaf of
`θ`, the others held fixed, the second term is zero in that leaf's block, almost everywhere and by JAX's
convention also at the kinks. That is a property of each leaf: the last layer has it in every network, all
layers have it in a relu network, and a weight that is used twice along a path has it nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from funcprop import _jax
from funcprop.curvature.diagonal.dependence import propagate
from funcprop.program.facts import is_piecewise_linear

AFFINE = "affine"


class Piecewise:
    """The analysis: AFFINE, or the reason why not, a text that begins with an operator."""

    def operator(self, eqn: Any, states: Sequence[Any]) -> Any:
        """AFFINE where the operator is piecewise affine in what is AFFINE."""
        curved = [s for s in states if s is not None and s != AFFINE]
        if curved:
            return curved[0]
        where = [i for i, s in enumerate(states) if s is not None]
        return AFFINE if is_piecewise_linear(eqn, where) else self.opaque(eqn)

    def opaque(self, eqn: Any) -> str:
        """The operator, and where it is."""
        scope = _jax.scope(eqn)
        return f"{_jax.function_name(eqn)}{f' in {scope}' if scope else ''} is curved in it"

    def join(self, a: Any, b: Any) -> Any:
        """The first that is curved."""
        return b if a == AFFINE else a

    def custom(self, given: Any, result: Any, pulled: Any) -> bool:
        """A pullback that does not depend on where it is taken."""
        return given == AFFINE and result == AFFINE and pulled(AFFINE, None) is None

    def into_loop(self, state: Any) -> Any:
        """A slice is linear."""
        return state

    def out_of_loop(self, state: Any) -> Any:
        """Stacking is linear."""
        return state


def why_curved(jaxpr: Any, position: int) -> str | None:
    """Why the results are not piecewise affine in one input, the others held fixed; None if they are."""
    count = len(_jax.open_jaxpr(jaxpr).invars)
    results = propagate(Piecewise(), jaxpr, [AFFINE if i == position else None for i in range(count)])
    return next((s for s in results if s is not None and s != AFFINE), None)
