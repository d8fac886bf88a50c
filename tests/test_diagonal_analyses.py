"""What the exact diagonal asks of a function, by its dense Hessian: is it separable, or piecewise affine?"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import compiled
from dense_diagonals import Y, cross_entropy, mixing_backwards, normal, of_dense_matrix, straight_through
from jax.flatten_util import ravel_pytree

from funcprop.curvature.diagonal.piecewise import why_curved
from funcprop.curvature.diagonal.separability import is_separable

APART = {
    "elementwise": lambda z: jnp.sum(jnp.tanh(z) * jnp.arange(3.0)),
    "softmax over features": lambda z: jnp.sum(jax.nn.softmax(z) ** 2) / 3,
    "layer norm": lambda z: jnp.mean(nn.LayerNorm(use_bias=False, use_scale=False).apply({}, z) ** 3),
    "attention": lambda z: jnp.sum(
        jnp.tanh(jax.nn.dot_product_attention(z[:, :, None], z[:, :, None], z[:, :, None]))
    ),
    "transposed and reshaped": lambda z: jnp.sum(jnp.sin(z.T.reshape(-1, 4).T.reshape(4, -1).sum(1))),
    "padded, concatenated, reversed": lambda z: jnp.sum(
        jnp.exp(jnp.pad(jnp.concatenate([z, z[:, ::-1]], 1), ((0, 0), (1, 0))).cumsum(1))
    ),
    "loop over features": lambda z: jax.lax.scan(lambda c, x: (jnp.sin(c + x), None), jnp.zeros(4), z.T)[
        0
    ].sum(),
    "branches": lambda z: jax.lax.cond(True, lambda z: jnp.sum(z**2), lambda z: jnp.sum(jnp.cos(z)), z),
    "custom derivatives": lambda z: jnp.sum(jax.nn.relu(z) * jax.nn.softplus(z) ** 2),
    "picked by label": lambda z: cross_entropy(z, Y),
    "convolution": lambda z: jnp.sum(
        jax.lax.conv_general_dilated(z[:, None], jnp.ones((2, 1, 2)), (1,), "SAME") ** 3
    ),
}
MIXING = {
    "square of the sum": lambda z: jnp.sum(z) ** 2,
    "batch norm": lambda z: jnp.sum((z / jnp.sqrt(jnp.var(z, 0) + 1)) ** 3),
    "Gram matrix": lambda z: jnp.sum((z @ z.T) ** 2),
    "reversed batch": lambda z: jnp.sum(z * z[::-1] ** 2),
    "sorted batch": lambda z: jnp.sum(jnp.sort(z, 0) * jnp.tanh(z)),
    "softmax over the batch": lambda z: jax.nn.logsumexp(z),
    "loop over the batch": lambda z: jax.lax.scan(lambda c, x: (jnp.sin(c + x), None), jnp.zeros(3), z)[
        0
    ].sum(),
    "custom derivative": lambda z: jnp.sum(jnp.sin(mixing_backwards(z))),
    "taken by index": lambda z: jnp.sum(z[jnp.array([1, 0, 3, 2])] * z**2),
}


@pytest.mark.parametrize("name", [*APART, *MIXING])
def test_separability_is_what_the_dense_hessian_shows(name: str) -> None:
    # float64 has room between what is zero and what is not.
    fun = {**APART, **MIXING}[name]
    if name == "attention":
        z: Any = normal(4, 2, 3)
    else:
        z = normal(4, 3)
    found = is_separable(jax.make_jaxpr(fun)(z), 0, 0)
    hessian = compiled(jax.jacrev(jax.grad(fun)))(z).reshape(4, z.size // 4, 4, z.size // 4)
    blocks = np.abs(np.asarray(hessian)).max(axis=(1, 3))
    between = (blocks - np.diag(np.diag(blocks))).max()
    assert found == (name in APART)
    assert (between < 1e-14) == (name in APART)


CURVED = {
    "product with itself": (lambda w: w * w, "mul is curved"),
    "tanh": (lambda w: jnp.tanh(w), "tanh"),
    "through an index": (lambda w: 1 / w, "div"),
    "its own norm": (lambda w: w / jnp.linalg.norm(w), "mul"),
    "straight through": (straight_through, "straight_through"),
    "absolute values of complex numbers": (lambda w: jnp.abs(w + 1j * w[::-1]), "abs is curved"),
    "in a loop": (lambda w: jax.lax.fori_loop(0, 3, lambda i, c: c * w, jnp.ones(3)), "mul"),
}
AFFINE = {
    "relu of a product": lambda w: jax.nn.relu(w @ jnp.ones((3, 3))) @ jnp.ones((3, 2)),
    "chosen": lambda w: jnp.where(w > 0, w, 0.1 * w),
    "pooled, padded, indexed": lambda w: jnp.max(jnp.pad(w, 1)[jnp.array([0, 2])]),
    "sorted": lambda w: jnp.sort(w) - jnp.clip(w, -1, 1),
    "in a loop": lambda w: jax.lax.scan(lambda c, x: (c + x, c), jnp.array(0.0), w),
    "added at places": lambda w: jax.nn.relu(jnp.zeros(4).at[jnp.array([0, 2, 2])].add(w)),
    "split, stacked, tiled": lambda w: jnp.abs(jnp.tile(jnp.stack(jnp.split(w, 3)), (2, 2))),
    "largest, remainders": lambda w: jax.lax.top_k(w, 2)[0] - jax.lax.rem(w[:2], 0.3),
    "its Fourier transform": lambda w: jnp.abs(jnp.fft.fft(w).real),
    "stopped": lambda w: jnp.sum(jax.lax.stop_gradient(jnp.exp(w)) * w),
}


@pytest.mark.parametrize("name", CURVED)
def test_what_is_curved_says_where(name: str) -> None:
    fun, reason = CURVED[name]
    assert reason in str(why_curved(jax.make_jaxpr(fun)(normal(3)), 0))


@pytest.mark.parametrize("name", AFFINE)
def test_what_is_piecewise_affine(name: str) -> None:
    assert why_curved(jax.make_jaxpr(AFFINE[name])(normal(3)), 0) is None
    assert (
        float(jnp.abs(of_dense_matrix(lambda w: ravel_pytree(AFFINE[name](w))[0].sum(), normal(3))).max())
        == 0
    )
