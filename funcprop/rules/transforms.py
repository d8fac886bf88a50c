"""JAX's transformations over `with_rules`: change `jax.grad` to `fp.grad` and nothing else."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax

from funcprop.graph.objective import positions
from funcprop.rules.misuse import explained
from funcprop.rules.rule_set import RuleSet
from funcprop.rules.running import with_rules


def grad(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
    allow_int: bool = False,
    reduce_axes: Sequence[Any] = (),
    *,
    rules: RuleSet | None = None,
) -> Callable[..., Any]:
    """`jax.grad` with hand-written backward rules: `∇f(x)`, of the structure and shapes of `x`.

    Args:
        fun: returns a scalar (and auxiliary data, with `has_aux`).
        argnums, has_aux, holomorphic, allow_int, reduce_axes: as in `jax.grad`.
        rules: a rule set; `fp.rules.default` if None.

    Raises:
        TypeError: `fun` does not return a scalar, or an argument has no derivative; as from `jax.grad`.
        RuleError: a rule does not fit its operator.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> print(fp.grad(lambda x: jnp.sum(x**2))(jnp.arange(3.0)))
        [0. 2. 4.]
    """
    options: Any = {"has_aux": has_aux, "holomorphic": holomorphic, "allow_int": allow_int}
    transform = partial(jax.grad, argnums=argnums, reduce_axes=reduce_axes, **options)
    return explained(transform, fun, with_rules(fun, rules), argnums, has_aux, allow_int)


def value_and_grad(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
    allow_int: bool = False,
    reduce_axes: Sequence[Any] = (),
    *,
    rules: RuleSet | None = None,
) -> Callable[..., Any]:
    """`jax.value_and_grad` with hand-written backward rules: `(f(x), ∇f(x))`.

    Args and errors as in `fp.grad`.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> value, gradient = fp.value_and_grad(lambda x: jnp.sum(x**2))(jnp.arange(3.0))
        >>> print(value, gradient)
        5.0 [0. 2. 4.]
    """
    options: Any = {"has_aux": has_aux, "holomorphic": holomorphic, "allow_int": allow_int}
    transform = partial(jax.value_and_grad, argnums=argnums, reduce_axes=reduce_axes, **options)
    return explained(transform, fun, with_rules(fun, rules), argnums, has_aux, allow_int)


def vjp(
    fun: Callable[..., Any],
    *primals: Any,
    has_aux: bool = False,
    rules: RuleSet | None = None,
    **options: Any,
) -> Any:
    """`jax.vjp` with hand-written backward rules: `f(x)` and the pullback `ȳ ↦ (∂y/∂x)ᵀ ȳ`.

    Args:
        fun, primals, has_aux: as in `jax.vjp`; so are other `options` that the running JAX has.
        rules: a rule set; `fp.rules.default` if None.

    Returns:
        `(value, pullback)`, or `(value, pullback, aux)` with `has_aux`.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> value, pullback = fp.vjp(jnp.sin, 0.0)
        >>> print(pullback(2.0)[0])
        2.0
    """
    pullback_of: Any = jax.vjp
    return pullback_of(with_rules(fun, rules), *primals, has_aux=has_aux, **options)


def _with_rules_option(function: Any) -> inspect.Signature:
    rules = inspect.Parameter("rules", inspect.Parameter.KEYWORD_ONLY, default=None)
    signature = inspect.signature(function)
    return signature.replace(parameters=[*signature.parameters.values(), rules])


vjp.__signature__ = _with_rules_option(jax.vjp)  # type: ignore[attr-defined]  # The running JAX's options.


def hvp(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    rules: RuleSet | None = None,
) -> Callable[..., Any]:
    """The Hessian-vector product `∇²f(x) v`, forward over reverse, without forming the Hessian.

    `hvp(fun, argnums)(primals, tangents, *rest)`: `primals` is the argument at `argnums` (a tuple of
    arguments if `argnums` is a sequence), `tangents` is `v` with the same structure, and `rest` are the
    other positional arguments in their order. The result has the structure of `primals`; with `has_aux` it is
    the pair of it and the auxiliary data that `fun` returns.

    Raises:
        TypeError: `fun` does not return a scalar, or `primals` and `tangents` differ in structure.

    Reference: Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 1994.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> print(fp.hvp(lambda x: jnp.sum(x**3))(jnp.ones(2), jnp.array([1.0, 2.0])))
        [ 6. 12.]
    """
    at = positions(argnums)
    gradient = grad(fun, at, has_aux, rules=rules)

    def product(primals: Any, tangents: Any, *rest: Any, **kwargs: Any) -> Any:
        several = (at,) if isinstance(at, int) else at
        count = len(several) + len(rest)
        chosen = [p % count for p in several]
        others = [p for p in range(count) if p not in chosen]

        def of_primals(primals: Any) -> Any:
            args: list[Any] = [None] * count
            for p, value in zip(chosen, (primals,) if isinstance(at, int) else primals, strict=True):
                args[p] = value
            for p, value in zip(others, rest, strict=True):
                args[p] = value
            return gradient(*args, **kwargs)

        _, *found = jax.jvp(of_primals, (primals,), (tangents,), has_aux=has_aux)
        return tuple(found) if has_aux else found[0]

    return product


def jacobian(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
    allow_int: bool = False,
    *,
    rules: RuleSet | None = None,
) -> Callable[..., Any]:
    """`jax.jacobian` (reverse mode) with hand-written backward rules.

    For results `y` and arguments `x`, each leaf has shape `y.shape + x.shape`.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> print(fp.jacobian(lambda x: x**2)(jnp.array([1.0, 2.0])))
        [[2. 0.]
         [0. 4.]]
    """
    return jax.jacrev(
        with_rules(fun, rules), argnums, has_aux=has_aux, holomorphic=holomorphic, allow_int=allow_int
    )
