"""For every primitive and every layer with a rule, arguments at which the rule is checked."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import funcprop as fp
from funcprop.rules.patterns import softmax
from funcprop.rules.primitives import average_pooling, convolution, loops, pooling


def numbers(*shape: int, seed: int = 0) -> jax.Array:
    return jax.device_put(np.random.default_rng(seed).standard_normal(shape))


def positive(*shape: int, seed: int = 0) -> jax.Array:
    return jax.device_put(np.random.default_rng(seed).uniform(0.2, 2, shape))


class Example(NamedTuple):
    """Arguments at which a rule is checked, and options of `check_rule`; static arguments among them.

    `rule` stands in for the registered one.
    """

    args: tuple[Any, ...]
    options: dict[str, Any] = {}  # noqa: RUF012
    rule: fp.Rule | None = None


def max_pool(x: jax.Array) -> jax.Array:
    return lax.reduce_window(
        x, -jnp.inf, lax.max, (1, 3, 2, 1), (1, 2, 2, 1), ((0, 0), (0, 1), (1, 0), (0, 0))
    )


def min_pool(x: jax.Array) -> jax.Array:
    return lax.reduce_window(x, jnp.inf, lax.min, (1, 2, 2, 1), (1, 2, 1, 1), "VALID")


def sum_pool(x: jax.Array) -> jax.Array:
    return lax.reduce_window(
        x, np.zeros((), x.dtype), lax.add, (1, 3, 2, 1), (1, 2, 1, 1), ((0, 0), (0, 1), (1, 0), (0, 0)), None,
        (1, 1, 2, 1),
    )  # fmt: skip


def convolve(x: jax.Array, w: jax.Array) -> jax.Array:
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, w, (2, 1), ((1, 0), (0, 2)), rhs_dilation=(1, 2), dimension_numbers=layout
    )


def loop(w: jax.Array, h: jax.Array) -> list[jax.Array]:
    last, sums = lax.scan(lambda c, _: (jnp.tanh(c @ w), jnp.sum(c)), h, None, length=3)
    return [last, sums]


ROWS = lax.GatherDimensionNumbers(offset_dims=(1,), collapsed_slice_dims=(0,), start_index_map=(0,))


def gather(x: jax.Array, indices: jax.Array) -> jax.Array:
    return lax.gather(x, indices, ROWS, (1, x.shape[1]))


def scatter(x: jax.Array, indices: jax.Array, updates: jax.Array) -> jax.Array:
    rows = lax.ScatterDimensionNumbers(
        update_window_dims=(1,), inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0,)
    )
    return lax.scatter_add(x, indices, updates, rows)


# The cost model leaves small convolutions to XLA; here the other ways are what is checked.
POOLS = {"max": pooling.rule(everywhere=True), "min": pooling.rule(minimum=True, everywhere=True)}
NOT_BY_XLA = convolution.rule(
    lambda geometry: convolution.ConvolutionPlan(margin=True, weight=True, input=True)
)

# For each primitive the `jax.lax` function that is this primitive, and examples for it.
PRIMITIVES: dict[str, tuple[Callable[..., Any], list[Example]]] = {
    "tanh": (lax.tanh, [Example((numbers(3, 4),)), Example((numbers(2) + 1j,), {"dtypes": ("float32",)})]),
    "logistic": (lax.logistic, [Example((numbers(3, 4),))]),
    "exp": (lax.exp, [Example((numbers(3, 4),))]),
    "sqrt": (lax.sqrt, [Example((positive(3, 4),))]),
    "rsqrt": (lax.rsqrt, [Example((positive(3, 4),))]),
    "dot_general": (
        lambda x, w: lax.dot_general(x, w, (((2,), (0,)), ((), ()))),
        [Example((numbers(2, 3, 2), numbers(2, 4, seed=1)))],
    ),
    "reduce_max": (lambda x: lax.reduce_max(x, (0, 2)), [Example((numbers(2, 3, 4),))]),
    "reduce_min": (lambda x: lax.reduce_min(x, (1,)), [Example((numbers(2, 3),))]),
    "cumlogsumexp": (lambda x: lax.cumlogsumexp(x, 1), [Example((numbers(2, 5),))]),
    "gather": (
        gather,
        [Example((numbers(4, 3), jnp.array([[1], [3], [1]])))],
    ),
    "scatter-add": (scatter, [Example((numbers(4, 3), jnp.array([[1], [3], [1]]), numbers(3, 3, seed=1)))]),
    "top_k": (lambda x: lax.top_k(x, 2), [Example((numbers(3, 4),))]),
    "scan": (loop, [Example((numbers(3, 3), numbers(2, 3)), rule=loops.rule(loops.ALWAYS))]),
    "reduce_window_max": (max_pool, [Example((numbers(2, 5, 6, 2),), rule=pooling.rule(everywhere=True))]),
    "reduce_window_min": (
        min_pool,
        [Example((numbers(2, 5, 6, 2),), rule=pooling.rule(minimum=True, everywhere=True))],
    ),
    "reduce_window_sum": (
        sum_pool,
        [Example((numbers(2, 5, 6, 2),), rule=average_pooling.rule(everywhere=True))],
    ),
    "conv_general_dilated": (
        convolve,
        [Example((numbers(2, 5, 6, 2), numbers(2, 3, 2, 3)), rule=NOT_BY_XLA)],
    ),
}

# For each layer with a rule, by its name in `funcprop.layers`, examples with all its arguments.
X, W, B = numbers(4, 3), numbers(3, 2, seed=1), numbers(2, seed=2)
ACTIVATION = [Example((numbers(3, 4),))]
LABELS = jnp.array([0, 6, -1, 3, -100])
POOL = {"window": (3, 2), "padding": ((0, 1), 1)}
LAYERS: dict[str, list[Example]] = {
    "relu": ACTIVATION,
    "tanh": ACTIVATION,
    "sigmoid": ACTIVATION,
    "softplus": ACTIVATION,
    "silu": ACTIVATION,
    "tanh_gelu": ACTIVATION,
    "exact_gelu": ACTIVATION,
    "softmax": [Example((numbers(3, 4),)), Example((numbers(2, 3, 4),), {"axis": (0, 2)})],
    "log_softmax": [
        Example((numbers(3, 4),), {"rule": softmax.log_rule(everywhere=True)}),
        Example((numbers(2, 3, 4),), {"axis": 1, "rule": softmax.log_rule(everywhere=True)}),
    ],
    "relu_max_pool": [Example((numbers(2, 5, 6, 2),), POOL)],
    "dense": [Example((X, W, B)), Example((X, W)), Example((X[0], W, B)), Example((numbers(2, 4, 3), W, B))],
    "linear": [Example((W.T, X[0], B)), Example((W.T, X[0]))],
    "softmax_cross_entropy": [
        Example((X, jnp.array([0, 2, 1, 1]))),
        Example((X, positive(4, 3))),
        Example((X[0], jnp.array(2))),
    ],
    "mean_squared_error": [Example((X, numbers(4, 3, seed=1)))],
    "l2_penalty": [Example((0.3, {"w": W, "b": B})), Example((0.3, W))],
    "focal_loss": [
        Example((X, jnp.array([[0, 1, 1]] * 4)), {"alpha": 0.3}),
        Example((X, positive(4, 3) / 2), {"gamma": 1.5}),
    ],
    "huber_loss": [Example((X, numbers(4, 3, seed=1)), {"delta": 0.7})],
    "attention": [
        # Grouped heads, lengths that are no multiples of the blocks.
        Example(
            (numbers(5, 2, 1), numbers(4, 1, 1, seed=1), numbers(4, 1, 2, seed=2)),
            {"causal": True, "offset": 1, "blocks": (2, 3)},
        )
    ],
    "linear_cross_entropy": [
        # A batch of labels for the same hidden states: the cotangent of the logits and the saved gradient are
        # made for each. Autodiff, whose logits are all there, sums first.
        Example(
            (numbers(5, 2), numbers(2, 7, seed=1), LABELS, None, positive(7)),
            {"chunk": 2, "label_smoothing": 0.1, "z_loss": 0.2, "batch_times_parameters": 3.0},
        ),
        Example(
            (numbers(5, 1, 2), numbers(7, 2, seed=1), LABELS[:, None], numbers(7, seed=2)),
            {"chunk": 3, "transposed": True, "reduction": "none", "batch_times_parameters": 5.0},
        ),
    ],
    "layer_norm": [
        Example((X, positive(3), numbers(3))),
        Example(
            (numbers(2, 3, 4), positive(3, 1)),
            {"axes": (0, -1), "use_fast_variance": False, "save": "output"},
        ),
    ],
    "rms_norm": [Example((X, positive(3)))],
    "group_norm": [Example((numbers(2, 3, 4), positive(4), numbers(4)), {"groups": 2})],
    "batch_norm": [
        Example((X, positive(3), numbers(3)), {"save": "output"}),
        Example((X, positive(3), None, fp.layers.BatchStatistics(numbers(3), positive(3)))),
    ],
    "norm_dense": [
        Example((X, W, B, positive(3), numbers(3))),
        Example((X[0], W, None, positive(3)), {"norm": "rms", "save": "all"}),
    ],
    "feed_forward": [
        Example((X, W, W.T, B, numbers(3))),
        Example((X[0], W, W.T), {"activation": "tanh", "save": "input"}),
    ],
    "embedding": [Example((jnp.array([[0, 2], [2, -1]]), W))],
    "dropout": [Example((X, jax.random.key(0)), {"rate": 0.5, "save": "key"})],
    "rotary": [
        Example((numbers(3, 2, 4), numbers(3, 1, 2))),
        Example((X[:, :2], numbers(4, 1)), {"pairing": "interleaved"}),
    ],
    "rnn": [Example((numbers(2, 3, 5), numbers(5, 4), numbers(4, 4), None, (numbers(3, 4),)))],
    "gru": [Example((numbers(2, 5), numbers(5, 12), numbers(4, 12), None, numbers(12)), {"save": "output"})],
    "lstm": [Example((numbers(2, 3, 5), numbers(5, 16), numbers(4, 16)), {"return_state": True})],
    "conv": [Example((numbers(2, 5, 4), numbers(3, 2, 6), numbers(6)), {"groups": 2, "strides": 2})],
    "max_pool": [Example((numbers(2, 5, 4, 3),), {"window": (3, 2), "strides": (2, 1)})],
    "avg_pool": [Example((numbers(2, 5, 3),), {"window": (3,), "padding": "SAME", "count_padding": False})],
    "swiglu": [Example((X, W, W * 2 + 1, W.T))],
    "geglu": [Example((X[0], W, W * 2 + 1), {"approximate": False, "save": "all"})],
}
