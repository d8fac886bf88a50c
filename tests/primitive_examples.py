"""One call of each primitive, as a function of the floating-point operands that are varied."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from funcprop import _jax

RNG = np.random.default_rng(0)


def normal(*shape: int) -> Any:
    """Numbers that float32 holds, between 0.1 and 3 in size, no two of them equal."""
    numbers = RNG.permutation(np.linspace(0.1, 3, int(np.prod(shape)) or 1)) * RNG.choice(
        [-1, 1], int(np.prod(shape))
    )
    return jax.device_put(numbers.reshape(shape).astype(np.float32).astype(np.float64))


def positive(*shape: int) -> Any:
    """The same, all positive."""
    return jnp.abs(normal(*shape))


def fraction(*shape: int) -> Any:
    """The same, between 0 and 1."""
    return jnp.asarray(np.asarray(positive(*shape) / 4, np.float32), np.float64)


X, Y, Z = normal(3, 4), normal(3, 4), normal(3, 4)
POS, FRACTION = positive(3, 4), fraction(3, 4)
WHOLE = jnp.arange(12).reshape(3, 4) - 5
ROWS = jnp.array([2, 0, 2])
MATRIX = normal(4, 4) + 4 * jnp.eye(4)
PICKED = lax.GatherDimensionNumbers((1,), (0,), (0,))
WRITTEN = lax.ScatterDimensionNumbers((1,), (0,), (0,))
WINDOW = {"window_dimensions": (1, 2), "window_strides": (1, 1), "padding": "VALID"}


def pooled_gradient(y: Any, x: Any) -> Any:
    return jax.vjp(lambda x: lax.reduce_window(x, -jnp.inf, lax.max, **WINDOW), x)[1](y)[0]


def pooled_tangent(t: Any, x: Any) -> Any:
    return jax.jvp(lambda x: lax.reduce_window(x, -jnp.inf, lax.max, **WINDOW), (x,), (t,))[1]


def written(write: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, rows: write(x, ROWS[:, None], rows, WRITTEN, mode="clip")


# By primitive, a function and its operands. They are operands of the primitive, which is its last equation.
EXAMPLES: dict[str, tuple[Any, ...]] = {
    "add": (lax.add, X, Y),
    "add_any": (lambda x, y: jax.vjp(lambda z: (z, z), X)[1]((x, y))[0], X, Y),
    "sub": (lax.sub, X, Y),
    "neg": (lax.neg, X),
    "real": (lax.real, X + 1j * Y),
    "imag": (lax.imag, X + 1j * Y),
    "conj": (lax.conj, X + 1j * Y),
    "complex": (lax.complex, X, Y),
    "reduce_precision": (lambda x: lax.reduce_precision(x, 11, 40), X),
    "mul": (lax.mul, X, Y),
    "div": (lax.div, X, Y),
    "select_n": (lambda x, y: lax.select_n(WHOLE > 0, x, y), X, Y),
    "max": (lax.max, X, Y),
    "min": (lax.min, X, Y),
    "abs": (lax.abs, X),
    "clamp": (lax.clamp, X, Y, Z),
    "rem": (lax.rem, X, Y),
    "square": (lax.square, X),
    "integer_pow": (lambda x: lax.integer_pow(x, 3), X),
    "pow": (lax.pow, POS, Y),
    "sqrt": (lax.sqrt, POS),
    "rsqrt": (lax.rsqrt, POS),
    "log": (lax.log, POS),
    "log1p": (lax.log1p, POS),
    "lgamma": (lax.lgamma, POS),
    "digamma": (lax.digamma, POS),
    "polygamma": (lambda x: lax.polygamma(jnp.ones_like(x), x), POS),
    "zeta": (lambda x: lax.zeta(2 + POS, x), POS),
    "igamma": (lambda x: lax.igamma(POS, x), POS),
    "igammac": (lambda x: lax.igammac(POS, x), POS),
    "regularized_incomplete_beta": (lambda x: lax.betainc(POS, 1 + POS, x), FRACTION),
    "acosh": (lax.acosh, 1 + POS),
    "atan2": (lax.atan2, X, Y),
    **{
        name: (getattr(lax, name), X)
        for name in ("exp", "exp2", "expm1", "logistic", "cbrt", "sin", "cos", "tan")
    },
    **{name: (getattr(lax, name), X) for name in ("atan", "sinh", "cosh", "tanh", "asinh", "erf", "erfc")},
    **{name: (getattr(lax, name), X) for name in ("bessel_i0e", "bessel_i1e")},
    **{name: (getattr(lax, name), FRACTION) for name in ("asin", "acos", "atanh", "erf_inv")},
    **{name: (getattr(lax, name), X, Y) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    **{name: (getattr(lax, name), X) for name in ("sign", "floor", "ceil", "round", "is_finite")},
    "stop_gradient": (lax.stop_gradient, X),
    "convert_element_type": (lambda x: lax.convert_element_type(x, np.complex128), X),
    "copy": (lambda x: lax.copy_p.bind(x), X),
    "name": (lambda x: checkpoint_name(x, "x"), X),
    "optimization_barrier": (lax.optimization_barrier, X),
    "device_put": (lambda x: jax.device_put(x, jax.devices()[0]), X),
    "reshape": (lambda x: lax.reshape(x, (2, 6)), X),
    "transpose": (lambda x: lax.transpose(x, (1, 0)), X),
    "squeeze": (lambda x: lax.squeeze(x, (0,)), X[None]),
    "broadcast_in_dim": (lambda x: lax.broadcast_in_dim(x, (2, 3, 4), (1, 2)), X),
    "rev": (lambda x: lax.rev(x, (1,)), X),
    "slice": (lambda x: lax.slice(x, (0, 1), (3, 3)), X),
    "split": (lambda x: lax.split(x, (1, 3), 1), X),
    "tile": (lambda x: lax.tile_p.bind(x, reps=(1, 2)), X),
    "unstack": (lambda x: jnp.unstack(x, axis=0), X),
    "stack": (lambda x, y: jnp.stack([x, y], 1), X, Y),
    "pad": (lambda x, y: lax.pad(x, y, ((1, 0, 0), (0, 0, 1))), X, X[0, 0] + 1),
    "concatenate": (lambda x, y: lax.concatenate([x, y], 1), X, Y),
    "gather": (lambda x: lax.gather(x, ROWS[:, None], PICKED, (1, 4), mode="clip"), X),
    "dynamic_slice": (lambda x: lax.dynamic_slice(x, (np.int32(1), np.int32(0)), (2, 4)), X),
    "dynamic_update_slice": (
        lambda x, y: lax.dynamic_update_slice(x, y, (np.int32(1), np.int32(0))),
        X,
        normal(2, 4),
    ),
    "scatter": (written(lax.scatter), X, normal(3, 4)),
    "scatter-add": (written(lax.scatter_add), X, normal(3, 4)),
    "scatter-sub": (written(lax.scatter_sub), X, normal(3, 4)),
    "scatter-mul": (written(lax.scatter_mul), X, normal(3, 4)),
    "scatter-min": (written(lax.scatter_min), X, normal(3, 4)),
    "scatter-max": (written(lax.scatter_max), X, normal(3, 4)),
    "sort": (lambda x: lax.sort(x, dimension=1), X),
    "top_k": (lambda x: lax.top_k(x, 2), X),
    "reduce_sum": (lambda x: lax.reduce_sum(x, (1,)), X),
    "reduce_max": (lambda x: lax.reduce_max(x, (1,)), X),
    "reduce_min": (lambda x: lax.reduce_min(x, (1,)), X),
    "reduce_prod": (lambda x: lax.reduce_prod(x, (1,)), X),
    "argmax": (lambda x: lax.argmax(x, 1, np.int32), X),
    "argmin": (lambda x: lax.argmin(x, 1, np.int32), X),
    "cumsum": (lambda x: lax.cumsum(x, 1), X),
    "cumprod": (lambda x: lax.cumprod(x, 1), X),
    "cummax": (lambda x: lax.cummax(x, 1), X),
    "cummin": (lambda x: lax.cummin(x, 1), X),
    "cumlogsumexp": (lambda x: lax.cumlogsumexp(x, 1), X),
    "reduce_window_sum": (lambda x: lax.reduce_window(x, 0.0, lax.add, **WINDOW), X),
    "reduce_window_max": (lambda x: lax.reduce_window(x, -jnp.inf, lax.max, **WINDOW), X),
    "reduce_window_min": (lambda x: lax.reduce_window(x, jnp.inf, lax.min, **WINDOW), X),
    "select_and_scatter_add": (lambda y: pooled_gradient(y, jnp.array([[1.0, 2.0, 0.0]])), normal(1, 2)),
    "select_and_gather_add": (lambda t: pooled_tangent(t, Y), X),
    "dot_general": (lambda x, y: lax.dot_general(x, y, (((1,), (0,)), ((), ()))), X, normal(4, 2)),
    "conv_general_dilated": (
        lambda x, k: lax.conv_general_dilated(x, k, (1,), "VALID"),
        normal(2, 3, 5),
        normal(2, 3, 2),
    ),
    "ragged_dot_general": (lambda x, y: lax.ragged_dot(x, y, jnp.array([1, 2])), X, normal(2, 4, 2)),
    "triangular_solve": (
        lambda a, b: lax.linalg.triangular_solve(a, b, left_side=True, lower=True),
        MATRIX,
        normal(4, 2),
    ),
    "tridiagonal_solve": (
        lambda b: lax.linalg.tridiagonal_solve(X[0], 4 + POS[0], X[1], b),
        normal(4, 2),
    ),
    "fft": (lambda x: lax.fft(x, "FFT", (4,)), X + 1j * Y),
    "cholesky": (lambda x: lax.linalg.cholesky(x, symmetrize_input=False), MATRIX @ MATRIX.T),
    "one_minus_square": (lambda x: lax.one_minus_square(x), X),  # type: ignore[attr-defined]
    "log2": (lambda x: lax.log2(x), POS),  # type: ignore[attr-defined]
}


@dataclass(frozen=True, eq=False)
class Example:
    """An equation, its varied operands, their places, and the equation as a function of these."""

    eqn: Any
    operands: Sequence[Any]
    places: Sequence[int]
    fun: Callable[..., list[Any]]

    @classmethod
    def of(cls, name: str) -> Example:
        """The example of a primitive."""
        fun, *operands = EXAMPLES[name]
        closed = _jax.inlined(jax.make_jaxpr(fun)(*operands))
        jaxpr = _jax.open_jaxpr(closed)
        (eqn,) = [e for e in jaxpr.eqns if e.primitive.name == name]
        places = [list(eqn.invars).index(v) for v in jaxpr.invars]
        return cls(eqn, operands, places, lambda *xs: jax.tree.leaves(fun(*xs)))

    def smooth(self, *operands: Any) -> Any:
        """All floating-point results as one real vector."""
        results = [jnp.ravel(y) for y in self.fun(*operands) if jnp.issubdtype(y.dtype, jnp.inexact)]
        parts = [p for y in results for p in ([y.real, y.imag] if jnp.iscomplexobj(y) else [y])]
        return jnp.concatenate(parts) if parts else jnp.zeros(0)
