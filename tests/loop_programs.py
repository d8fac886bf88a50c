"""Sizes and numbers of small loops, when two results are the same, and which products are in a loop."""

from __future__ import annotations

import jax
import numpy as np

T, B, H = 5, 2, 3


def normal(*shape, seed=0):
    return jax.device_put(np.random.default_rng(seed).normal(size=shape) * 0.5)


def close(actual, expected):
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-11, atol=1e-12), actual, expected)


def products_in_loops(fun, *args, of=lambda eqn: eqn.outvars[0].aval.shape):
    """The shapes of the results of all products inside of loops, or another property of their equations."""
    found = []

    def walk(jaxpr, inside):
        for eqn in jaxpr.eqns:
            if inside and eqn.primitive.name == "dot_general":
                found.append(of(eqn))
            for value in eqn.params.values():
                body = getattr(value, "jaxpr", value)
                if hasattr(body, "eqns"):
                    walk(body, inside or eqn.primitive.name == "scan")

    walk(jax.make_jaxpr(fun)(*args).jaxpr, False)
    return found
