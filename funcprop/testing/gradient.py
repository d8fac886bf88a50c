"""`check_gradient`: the gradient of a whole function with rules, against autodiff and finite differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcprop.rules import transforms
from funcprop.rules.rule_set import RuleSet
from funcprop.testing.case import cast, generator, magnitude, normal_like
from funcprop.testing.compare import CheckReport, CheckRow, Claim, Tolerances
from funcprop.testing.terms import DIRECTIONS, inner


def check_gradient(
    fun: Callable[..., Any],
    *args: Any,
    argnums: int | Sequence[int] = 0,
    rules: RuleSet | None = None,
    tolerance: float | None = None,
) -> CheckReport:
    """Check `fp.grad(fun)` against `jax.grad(fun)` and against finite differences.

    For every array `x` in the arguments at `argnums` and random directions `v`, in float64:
    `∇ₓJ` is that of `jax.grad`, and `⟨∇ₓJ, v⟩ = (J(x + hv) − J(x − hv)) / 2h`.

    Args:
        fun: returns a scalar.
        *args: its arguments, differentiated or not; inexact arrays are converted to float64.
        argnums: which arguments are differentiated, as in `jax.grad`.
        rules: a rule set; `fp.rules.default` if None.
        tolerance: relative to the largest entry of the array; by default `ε^⅔`, 4e-11.

    Returns:
        A report with one row for every array and comparison.

    Raises:
        CheckError: names the path of the array, the largest deviation and, where it can be seen, the likely
            mistake.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> from funcprop.testing.gradient import check_gradient
        >>> loss = lambda w, x: jnp.sum(jnp.tanh(x @ w["kernel"]) ** 2)
        >>> report = check_gradient(loss, {"kernel": jnp.ones((3, 2))}, jnp.ones((4, 3)))
        >>> [row.term for row in report.rows]
        ["argument 0['kernel'] against autodiff", "argument 0['kernel'] against finite differences"]
    """
    subject = getattr(fun, "__name__", type(fun).__name__)
    positions = [p % len(args) for p in ((argnums,) if isinstance(argnums, int) else argnums)]
    with jax.enable_x64(True):
        precision = Tolerances.of(jnp.float64) if tolerance is None else Tolerances.of_tolerance(tolerance)
        full = [jax.tree.map(lambda x: cast(x, jnp.float64) if _is_inexact(x) else x, a) for a in args]
        chosen = {p: full[p] for p in positions}
        paths, tree = jax.tree.flatten_with_path(chosen)
        names = [f"argument {path[0].key}{jax.tree_util.keystr(path[1:])}" for path, _ in paths]
        leaves = [leaf for _, leaf in paths]

        def of_leaves(leaves: list[Any]) -> Any:
            values = jax.tree.unflatten(tree, leaves)
            return fun(*[values.get(p, arg) for p, arg in enumerate(full)])

        value = jax.jit(of_leaves)
        found = transforms.grad(of_leaves, rules=rules, allow_int=True)(leaves)
        expected = jax.grad(of_leaves, allow_int=True)(leaves)
        smooth = [i for i, leaf in enumerate(leaves) if _is_inexact(leaf)]
        scale = max([1.0, *(magnitude(expected[i]) for i in smooth)])
        others = {f"gradient of {names[i]}": expected[i] for i in smooth}
        rng = generator(0)
        rows = []

        def verify(claim: Claim) -> None:
            rows.append(
                CheckRow(f"{claim.what.removeprefix('gradient of ')} {claim.where}", 1, claim.verify(subject))
            )

        for i in smooth:
            what = f"gradient of {names[i]}"
            verify(
                Claim(
                    "against autodiff",
                    what,
                    found[i],
                    expected[i],
                    precision.relative,
                    precision.absolute * scale,
                    leaves[i].dtype,
                    others,
                )
            )
            h = precision.step
            x = np.asarray(leaves[i])
            directions = [np.asarray(normal_like(rng, x)) for _ in range(DIRECTIONS)]
            ends = [
                [value([*leaves[:i], jnp.asarray(x + s * h * v), *leaves[i + 1 :]]) for s in (1, -1)]
                for v in directions
            ]
            slopes = jnp.asarray([(plus - minus) / (2 * h) for plus, minus in ends])
            along = jnp.asarray([inner([found[i]], [v]) for v in directions])
            floor = 100 * precision.relative * max(1.0, magnitude(jnp.asarray(ends)))
            verify(Claim("against finite differences", what, along, slopes, h, floor))
    return CheckReport(f"gradient of {subject}", tuple(rows))


def _is_inexact(x: Any) -> bool:
    if isinstance(x, float | complex):
        return True
    return isinstance(x, jax.Array | np.ndarray | np.generic) and jnp.issubdtype(x.dtype, jnp.inexact)
