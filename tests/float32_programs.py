"""Gradients in float32 as users compile them, beside those of `jax.grad` in float64; JSON on the last line.

Run by `test_float32_as_users_run.py` in a process of its own, without the flags of the other tests. The cases
of `NIGHTLY` are further instances of others, and run with FUNCPROP_NIGHTLY.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

import funcprop as fp

L = fp.layers
REFERENCE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(sum(shape)).standard_normal(shape)).astype(np.float32)


def matrix(*shape: int) -> np.ndarray:
    return normal(*shape, scale=shape[-2] ** -0.5)


class Case(NamedTuple):
    """A function, its differentiable arguments, the operator whose rule is looked at, and the derivative."""

    fun: Callable[..., Any]
    args: tuple[Any, ...]
    rule: str
    second_order: bool = False


def max_pool(window: int, stride: int, before: Callable[[Any], Any] = lambda x: x) -> Callable[..., Any]:
    return lambda x: nn.max_pool(before(x), (window, window), (stride, stride), "SAME")


def avg_pool(window: int, stride: int) -> Callable[..., Any]:
    return lambda x: nn.avg_pool(x, (window, window), (stride, stride), "SAME", count_include_pad=False)


def conv(stride: int, padding: str) -> Callable[..., Any]:
    layout = ("NHWC", "HWIO", "NHWC")
    return lambda x, w: lax.conv_general_dilated(x, w, (stride, stride), padding, dimension_numbers=layout)


def recurrent(h: Any, p: Any, x: Any, cell: Callable[..., Any]) -> Any:
    """A recurrent network as it is written by hand."""

    def step(h: Any, x: Any) -> Any:
        h = cell(x @ p["w"], h, p)
        return h, jax.tree.leaves(h)[0]

    return lax.scan(step, jax.tree.map(lambda a: jnp.asarray(a, x.dtype), h), x)[1]


def rnn(z: Any, h: Any, p: Any) -> Any:
    return jnp.tanh(z + h @ p["u"])


def lstm(z: Any, state: Any, p: Any) -> Any:
    h, c = state
    i, f, g, o = jnp.split(z + h @ p["u"], 4, -1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def gru(z: Any, h: Any, p: Any) -> Any:
    r, u = jnp.split(jax.nn.sigmoid(z[..., :32] + h @ p["u"]), 2, -1)
    return (1 - u) * jnp.tanh(z[..., 32:] + (r * h) @ p["v"]) + u * h


SEEN = np.arange(256) < 200  # the rest of the keys is padding
LABELS = np.arange(96) * 7 % 50
IMAGES, STEPS = normal(8, 12, 12, 64), normal(24, 4, 12)
QKV = normal(2, 256, 2, 8), normal(2, 256, 1, 8, scale=2.0), normal(2, 256, 1, 9)
H, C = np.zeros((4, 16), np.float32), np.ones((4, 16), np.float32)

CASES = {
    "max pool": Case(max_pool(2, 2), (IMAGES,), "reduce_window_max"),
    "overlapping max pool": Case(max_pool(3, 1), (IMAGES,), "reduce_window_max"),
    "overlapping max pool, strided": Case(max_pool(3, 2), (IMAGES,), "reduce_window_max"),
    "relu before a max pool": Case(max_pool(3, 2, jax.nn.relu), (IMAGES,), "relu_max_pool"),
    "average pool": Case(avg_pool(2, 2), (IMAGES,), "reduce_window_sum"),
    "overlapping average pool": Case(avg_pool(3, 2), (IMAGES,), "reduce_window_sum"),
    "convolution": Case(
        conv(1, "SAME"), (normal(64, 12, 12, 32), normal(3, 3, 32, 64)), "conv_general_dilated"
    ),
    "strided convolution": Case(
        conv(2, "VALID"), (normal(33, 17, 17, 16), normal(3, 3, 16, 48)), "conv_general_dilated"
    ),
    "rnn by hand": Case(
        lambda p, x: recurrent(H, p, x, rnn), ({"w": matrix(12, 16), "u": matrix(16, 16)}, STEPS), "scan"
    ),
    "lstm by hand": Case(
        lambda p, x: recurrent((H, C), p, x, lstm),
        ({"w": matrix(12, 64), "u": matrix(16, 64)}, STEPS),
        "scan",
    ),
    "gru by hand": Case(
        lambda p, x: recurrent(H, p, x, gru),
        ({"w": matrix(12, 48), "u": matrix(16, 32), "v": matrix(16, 16)}, STEPS),
        "scan",
    ),
    "few rows and a large matrix": Case(
        lambda p, x: recurrent(np.zeros((2, 600), np.float32), p, x, rnn),
        ({"w": matrix(12, 600), "u": matrix(600, 600)}, STEPS[:5, :2]),
        "scan",
    ),
    "lstm layer": Case(L.lstm, (STEPS, matrix(12, 64), matrix(16, 64), normal(64)), "lstm"),
    "gru layer": Case(L.gru, (STEPS, matrix(12, 48), matrix(16, 48), normal(48)), "gru"),
    "causal attention": Case(lambda *a: L.attention(*a, causal=True), QKV, "attention"),
    "causal attention with padding": Case(
        lambda *a: L.attention(*a, None, SEEN, causal=True), QKV, "attention"
    ),
    "product of attention's Hessian": Case(
        lambda *a: L.attention(*a, causal=True), QKV, "attention", second_order=True
    ),
    "linear_cross_entropy": Case(
        lambda h, w: L.linear_cross_entropy(h, w, LABELS, chunk=40),
        (normal(96, 16), matrix(16, 50)),
        "linear_cross_entropy",
    ),
    "norm_dense": Case(
        L.norm_dense,
        (normal(4, 9, 24), matrix(24, 32), normal(32), 1 + normal(24, scale=0.1), normal(24)),
        "norm_dense",
    ),
    "feed_forward": Case(
        L.feed_forward,
        (normal(4, 9, 16), matrix(16, 40), matrix(40, 16), normal(40), normal(16)),
        "feed_forward",
    ),
    "gelu": Case(jax.nn.gelu, (2 * normal(64, 33),), "tanh_gelu"),
    "silu": Case(jax.nn.silu, (2 * normal(64, 33),), "silu"),
    "softmax": Case(jax.nn.softmax, (3 * normal(64, 33),), "softmax"),
    "products of rows": Case(
        lambda x, w, v: jnp.tanh(jnp.tanh(x @ w) @ v),
        (normal(4, 9, 16), matrix(16, 48), matrix(48, 64)),
        "dot_general",
    ),
    "product of a network's Hessian": Case(
        lambda x, w, v: jax.nn.softmax(jax.nn.gelu(x @ w) @ v),
        (normal(4, 9, 16), matrix(16, 48), matrix(48, 64)),
        "dot_general",
        second_order=True,
    ),
    "layer_norm": Case(L.layer_norm, (normal(8, 40), 1 + normal(40, scale=0.1), normal(40)), "layer_norm"),
    "cumlogsumexp": Case(lambda x: lax.cumlogsumexp(x, 1), (3 * normal(8, 50),), "cumlogsumexp"),
}

NIGHTLY = {
    "overlapping max pool",  # strided
    "average pool",  # overlapping
    "rnn by hand",  # few rows and a large matrix
    "gru by hand",  # lstm by hand
    "gru layer",  # lstm layer
    "causal attention",  # with padding
    "silu",  # gelu
}


def derivative(case: Case, rules: Any) -> Callable[..., Any]:
    """Results and cotangents, or a product with the Hessian, of a weighted sum of squares and results."""

    def loss(args: Any) -> Any:
        y = case.fun(*args)
        weights = jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
        return jnp.sum(weights * (y + y**2)), y

    if case.second_order:
        return lambda args: fp.hvp(lambda a: loss(a)[0], rules=rules)(args, jax.tree.map(jnp.cos, args))
    return fp.value_and_grad(loss, has_aux=True, rules=rules)


def worst(actual: Any, expected: Any) -> float:
    """The largest error of any array, as a share of its largest entry."""
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    return max(float(np.max(np.abs(a - e)) / np.max(np.abs(e))) for a, e in pairs)


def checked(name: str, case: Case) -> list[dict[str, Any]]:
    args = jax.tree.map(jnp.asarray, case.args)
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), case.args)
        found = jax.jit(derivative(case, fp.rules.autodiff), compiler_options=REFERENCE)(exact)
        expected = jax.tree.map(np.asarray, found)
    rows, programs = [], set()
    for rules in (fp.rules.default, fp.rules.handwritten):
        fired = tuple((m.operator, m.reason) for m in fp.matches(case.fun, rules)(*args))
        if fired in programs:
            continue
        programs.add(fired)
        start = time.perf_counter()
        actual = jax.tree.map(np.asarray, jax.jit(derivative(case, rules))(args))
        # The sum itself may cancel: its terms are among what is compared.
        parts = (
            (actual, expected)
            if case.second_order
            else ((actual[0][1], actual[1]), (expected[0][1], expected[1]))
        )
        assert all(a.dtype == np.float32 for a in jax.tree.leaves(actual))
        rows.append(
            {
                "case": name,
                "rules": rules.name,
                "fires": (case.rule, None) in fired,
                "error": worst(*parts),
                "seconds": time.perf_counter() - start,
            }
        )
    return rows


if __name__ == "__main__":
    chosen = [name for name in CASES if os.environ.get("FUNCPROP_NIGHTLY") or name not in NIGHTLY]
    print(json.dumps([row for name in chosen for row in checked(name, CASES[name])]))
