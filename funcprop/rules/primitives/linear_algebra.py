"""Equations of matrices that are factored or solved with.

    triangular_solve   y = L⁻¹ b        b̄ = L⁻ᵀ ȳ,  L̄ = −tril(b̄ yᵀ)
    solve              y = A⁻¹ b        b̄ = A⁻ᵀ ȳ,  Ā = −b̄ yᵀ
    cholesky           A = L Lᵀ         Ā = L⁻ᵀ tril½(Lᵀ L̄) L⁻¹, half of the diagonal
    eigenvalues        A = Q Λ Qᵀ       Ā = Q diag(λ̄) Qᵀ
    singular values    A = U Σ Vᵀ       Ā = U diag(σ̄) Vᵀ
    log |det A|                         Ā = ȳ A⁻ᵀ

Source: Giles, *Collected matrix derivative results for forward and reverse mode AD* (2008), section 2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from funcprop.rules.equations import Equations, OperatorSymbols, apply, opaque, outer, written
from funcprop.rules.expressions import ATOM, POWER, PRODUCT, SUM, Expression, factors
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


def _solve(op: OperatorSymbols) -> Equations:
    """`A⁻¹ b`; the inverse itself where `b` is the identity."""
    a, b = op.args
    transposed = lambda a, g: jnp.linalg.solve(jnp.matrix_transpose(a), g)  # noqa: E731
    of_b = _product(transposed, (a, op.cotangent), "⁻ᵀ", b.type)
    if b.text() == "I":
        forward = Expression(jnp.linalg.solve, (a, b), "{0}⁻¹", "{0}^{{-1}}", POWER, ATOM, op.output.type)
    else:
        forward = _product(jnp.linalg.solve, (a, b), "⁻¹", op.output.type)
    if len(a.shape) == 2:
        pair = outer(of_b, op.output) if len(b.shape) == 1 else of_b @ op.output.T
    else:
        # A matrix for each example.
        rows = lambda x, y: x @ jnp.matrix_transpose(y)  # noqa: E731
        pair = factors(rows, (of_b, op.output), "{0} {1}ᵀ", "{0}\\, {1}^{{\\top}}", a.type)
    return Equations(forward, (-pair, of_b))


def _tril(op: OperatorSymbols) -> Equations:
    def lower(x: Expression) -> Expression:
        return apply("tril", jnp.tril, x, type_=x.type)

    return Equations(lower(op.args[0]), (lower(op.cotangent),))


@functools.cache
def _reads_one_triangle() -> bool:
    """Whether the cotangent of a matrix that `cholesky` reads is of its lower triangle, as since JAX 0.12."""
    with jax.ensure_compile_time_eval():
        pull = jax.vjp(lambda a: lax.linalg.cholesky(a, symmetrize_input=False), jnp.eye(2) + 1)[1]
        (found,) = pull(jnp.tril(jnp.ones((2, 2))))
        return bool(found[0, 1] == 0)


def _cholesky(op: OperatorSymbols) -> Equations | None:
    """`A = L Lᵀ`; of the lower triangle of `Lᵀ L̄` half of the diagonal counts."""
    (a,) = op.args
    if len(a.shape) != 2 or not jnp.issubdtype(a.type.dtype, jnp.floating):
        return None
    lower = op.output
    factor = lambda a: lax.linalg.cholesky(a, symmetrize_input=False)  # noqa: E731

    def half(x: Any) -> Any:
        return jnp.tril(x) - jnp.diag(jnp.diag(x)) / 2

    def back(y: Any, g: Any) -> Any:
        y = jnp.tril(y)
        solve = lax.linalg.triangular_solve
        left = solve(y, half(y.T @ jnp.tril(g)), left_side=True, lower=True, transpose_a=True)
        return solve(y, left, left_side=False, lower=True)

    text = "{0}⁻ᵀ tril½({0}ᵀ {1}) {0}⁻¹"
    latex = "{0}^{{-\\top}}\\, \\mathrm{{tril}}_{{1/2}}\\!\\left({0}^{{\\top}}\\, {1}\\right) {0}^{{-1}}"
    backward = Expression(back, (lower, op.cotangent), text, latex, PRODUCT, POWER, a.type)
    if _reads_one_triangle():
        of_both = lambda x: half(x + x.T)  # noqa: E731
        latex = "\\mathrm{{tril}}_{{1/2}}\\!\\left({0} + \\left({0}\\right)^{{\\top}}\\right)"
        backward = written(of_both, (backward,), "tril½({0} + ({0})ᵀ)", latex, a.type)
    return Equations(apply("chol", factor, a, type_=op.output.type), (backward,))


def _eigenvalues(op: OperatorSymbols) -> Equations:
    """Of `A = Q Λ Qᵀ`."""
    (a,) = op.args
    values = lambda a: lax.linalg.eigh(a, symmetrize_input=False)[1]  # noqa: E731

    def back(a: Any, g: Any) -> Any:
        q = lax.linalg.eigh(a, symmetrize_input=False)[0]
        return (q * g) @ q.T

    backward = _framed(back, (a, op.cotangent), "Q({0}) diag({1}) Q({0})ᵀ", a.type)
    return Equations(apply("eigenvalues", values, a, type_=op.output.type), (backward,))


def _singular_values(op: OperatorSymbols) -> Equations:
    """Of `A = U Σ Vᵀ`."""
    (a,) = op.args

    def back(a: Any, g: Any) -> Any:
        u, _, v = jnp.linalg.svd(a, full_matrices=False)
        return (u * g) @ v

    values = lambda a: jnp.linalg.svd(a, compute_uv=False)  # noqa: E731
    backward = _framed(back, (a, op.cotangent), "U({0}) diag({1}) V({0})ᵀ", a.type)
    return Equations(apply("svd", values, a, type_=op.output.type), (backward,))


def _trace(op: OperatorSymbols) -> Equations:
    (a,) = op.args
    identity = opaque(lambda: jnp.eye(a.shape[0], dtype=a.type.dtype), (), "I", "\\mathbf{{I}}", a.type)
    forward = apply("tr", jnp.trace, a, type_=op.output.type)
    return Equations(forward, (op.cotangent * identity,))


def _diagonal(op: OperatorSymbols) -> Equations:
    def diagonal(x: Expression, like: Any) -> Expression:
        return apply("diag", jnp.diag, x, type_=like)

    return Equations(diagonal(op.args[0], op.output.type), (diagonal(op.cotangent, op.args[0].type),))


def _logdet(op: OperatorSymbols) -> Equations:
    """`log |det A|`, whose slope is the transpose of the inverse."""
    (a,) = op.args
    forward = written(
        lambda a: jnp.linalg.slogdet(a)[1],
        (a,),
        "log |det {0}|",
        "\\log \\left|\\det {0}\\right|",
        op.output.type,
    )
    return Equations(forward, (op.cotangent * _inverse_of_transpose(a),))


def _determinant(op: OperatorSymbols) -> Equations | None:
    """`det A`, whose slope is that times the transpose of the inverse."""
    (a,) = op.args
    if len(a.shape) != 2:
        return None
    forward = apply("det", jnp.linalg.det, a, type_=op.output.type)
    return Equations(forward, (op.cotangent * op.output * _inverse_of_transpose(a),))


def _inverse_of_transpose(a: Expression) -> Expression:
    return Expression(lambda a: jnp.linalg.inv(a).T, (a,), "{0}⁻ᵀ", "{0}^{{-\\top}}", POWER, ATOM, a.type)


def _framed(
    function: Callable[..., Any], operands: Sequence[Expression], text: str, type_: Any
) -> Expression:
    latex = text.replace("ᵀ", "^{{\\top}}").replace("diag", "\\mathrm{{diag}}")
    return Expression(function, tuple(operands), text, latex, PRODUCT, SUM, type_)


_LATEX = {"⁻¹": "^{{-1}}", "⁻ᵀ": "^{{-\\top}}"}


def _product(
    function: Callable[..., Any], operands: Sequence[Expression], mark: str, type_: Any
) -> Expression:
    text, latex = f"{{0}}{mark} {{1}}", f"{{0}}{_LATEX[mark]}\\, {{1}}"
    return Expression(function, tuple(operands), text, latex, PRODUCT, POWER, type_)


EQUATIONS: dict[str, Callable[[OperatorSymbols], Equations | None]] = {
    "triangular_solve": _triangular_solve,
    "solve": _solve,
    "tril": _tril,
    "trace": _trace,
    "diag": _diagonal,
    "chol": _cholesky,
    "eigenvalues": _eigenvalues,
    "singular_values": _singular_values,
    "logdet": _logdet,
    "det": _determinant,
}
