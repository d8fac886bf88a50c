"""Equations of solves with triangular matrices.

    triangular_solve   y = L⁻¹ b        b̄ = L⁻ᵀ ȳ,  L̄ = −tril(b̄ yᵀ)

Source: Giles, *Collected matrix derivative results for forward and reverse mode AD* (2008), section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from funcprop.rules.equations import Equations, OperatorSymbols, written
from funcprop.rules.expressions import POWER, PRODUCT, Expression, factors, node
from funcprop.rules.notation import literally


def _triangular_solve(op: OperatorSymbols) -> Equations | None:
    """`L⁻¹ b`, `L⁻ᵀ b`: of real matrices from the left."""
    a, b = op.args
    static = dict(op.static)
    if not static["left_side"] or static["unit_diagonal"] or not jnp.issubdtype(a.type.dtype, jnp.floating):
        return None
    flips = bool(static["transpose_a"])

    def solve(a: Any, b: Any) -> Any:
        return lax.linalg.triangular_solve(a, b, **static)

    def of_b(a: Any, g: Any) -> Any:
        return jax.linear_transpose(lambda b: solve(a, b), b.type)(g)[0]

    def of_a(g: Any, a: Any, y: Any) -> Any:
        back = of_b(a, g)
        full = jnp.einsum("...ij,...kj->...ik", *((y, back) if flips else (back, y)))
        return jnp.tril(full) if static["lower"] else jnp.triu(full)

    there, back = ("⁻ᵀ", "⁻¹") if flips else ("⁻¹", "⁻ᵀ")
    forward = _product(solve, (a, b), there, op.output.type)
    of_right = _product(of_b, (a, op.cotangent), back, b.type)
    part = "tril" if static["lower"] else "triu"
    left, right = (op.output, of_right) if flips else (of_right, op.output)
    whole = factors(
        lambda *_: jnp.zeros(a.shape, a.type.dtype), (left, right), "{0} {1}ᵀ", "{0}\\, {1}^{{\\top}}", a.type
    )
    of_left = -written(
        of_a,
        (op.cotangent, a, op.output),
        literally(f"{part}({whole.text()})"),
        literally(f"\\mathrm{{{part}}}\\!\\left({whole.latex()}\\right)"),
        a.type,
    )
    return Equations(forward, (of_left, of_right))


_LATEX = {"⁻¹": "^{{-1}}", "⁻ᵀ": "^{{-\\top}}"}


def _product(
    function: Callable[..., Any], operands: Sequence[Expression], mark: str, type_: Any
) -> Expression:
    text, latex = f"{{0}}{mark} {{1}}", f"{{0}}{_LATEX[mark]}\\, {{1}}"
    return node(function, tuple(operands), text, latex, PRODUCT, POWER, type_)


EQUATIONS: dict[str, Callable[[OperatorSymbols], Equations | None]] = {"triangular_solve": _triangular_solve}
