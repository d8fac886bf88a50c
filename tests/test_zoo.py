"""Gradients of the whole zoo equal JAX's, to rounding, and lower wherever JAX's do."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import ZOO

import funcprop as fp

HANDWRITTEN = fp.rules.handwritten

# Every way to the gradient of `fun` that must equal `jax.grad(fun)`.
WAYS = {
    "grad(rules=handwritten)": lambda fun: fp.grad(fun, rules=HANDWRITTEN),
    "grad": fp.grad,
    "jax.grad(with_rules)": lambda fun: jax.grad(fp.with_rules(fun, HANDWRITTEN)),
}
if hasattr(fp, "backprop"):
    WAYS["backprop"] = lambda fun: lambda *args: fp.backprop(fun)(*args).gradient

# Most of the time goes into compiling; unoptimised code is quicker to make.
compiled = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)

every_entry = pytest.mark.parametrize("entry", ZOO.values(), ids=ZOO)


def assert_close(actual, expected, tolerance, where):
    """Relative to the largest number of the leaf, with a floor at the largest of the whole gradient.

    The floor is for leaves whose true gradient is zero, where both sides are rounding errors.
    """
    assert jax.tree.structure(actual) == jax.tree.structure(expected), where
    largest = max((np.max(np.abs(leaf)) for leaf in jax.tree.leaves(expected) if leaf.size), default=0.0)
    for (path, a), e in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        name = f"{where} {jax.tree_util.keystr(path)}"
        assert (a.shape, a.dtype, a.weak_type) == (e.shape, e.dtype, e.weak_type), name
        a, e = np.asarray(a).astype(complex), np.asarray(e).astype(complex)
        scale = max(np.max(np.abs(e), initial=0.0), 1e-2 * largest)
        assert np.max(np.abs(a - e), initial=0.0) <= tolerance * scale, name


@pytest.mark.sampled(8)
@every_entry
def test_gradient(entry):
    fun, args = entry.build()
    expected, actual = compiled(
        lambda *args: (jax.grad(fun)(*args), {name: way(fun)(*args) for name, way in WAYS.items()})
    )(*args)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(expected)), "the gradient is zero: nothing is tested"
    for name, gradient in actual.items():
        assert_close(gradient, expected, entry.tolerance, f"{entry.name}: {name}")


@pytest.mark.sampled(6)
@pytest.mark.parametrize("entry", [e for e in ZOO.values() if e.twice], ids=lambda e: e.name)
def test_hessian_vector_product(entry):
    fun, (params, *rest) = entry.build()
    direction = jax.tree.map(lambda p: jnp.cos(jnp.arange(p.size, dtype=p.dtype)).reshape(p.shape), params)

    def both(params, direction, *rest):
        expected = jax.jvp(lambda p: jax.grad(fun)(p, *rest), (params,), (direction,))[1]
        return fp.hvp(fun, rules=HANDWRITTEN)(params, direction, *rest), expected

    actual, expected = compiled(both)(params, direction, *rest)
    # Second derivatives round more: the same sums in another order, once more differentiated.
    assert_close(actual, expected, 10 * entry.tolerance, f"{entry.name}: hvp")


@pytest.mark.sampled(6)
@every_entry
def test_gradient_lowers_for_accelerators(entry):
    fun, args = entry.build()

    def failure(gradient, platform):
        """Why the gradient cannot be lowered, or None; some functions JAX itself cannot lower."""
        try:
            jax.jit(gradient).trace(*args).lower(lowering_platforms=(platform,))
        except Exception as error:
            return error
        return None

    for platform in ("cuda", "tpu"):
        ours = failure(fp.grad(fun, rules=HANDWRITTEN), platform)
        if ours is not None:
            theirs = failure(jax.grad(fun), platform)
            if theirs is None:
                raise ours
            assert type(ours) is type(theirs)
