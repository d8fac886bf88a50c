"""Models as people write them: Flax linen and nnx, Equinox, Haiku, with optax losses."""

from __future__ import annotations

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import nnx

from zoo.entry import Family, filled, integers, normal, random_key

FAMILY = Family()


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# --- Flax linen -------------------------------------------------------------------------------


@FAMILY()
def linen_mlp():
    model = nn.Sequential([nn.Dense(6), nn.tanh, nn.Dense(5), nn.gelu, nn.Dense(3)])
    x, y = normal(1, 4, 5), integers(2, 3, 4)
    params = filled(jax.eval_shape(model.init, random_key(0), x))
    return lambda params, x, y: cross_entropy(model.apply(params, x), y), (params, x, y)


class LinenCNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3))(x)
        x = nn.BatchNorm(use_running_average=False, momentum=0.9)(x)
        x = nn.max_pool(nn.relu(x), (2, 2), strides=(2, 2))
        x = nn.Conv(3, (3, 3), strides=2, padding="VALID")(x)
        x = nn.avg_pool(nn.silu(x), (2, 2))
        return nn.Dense(3)(x.reshape(x.shape[0], -1))


@FAMILY()
def linen_cnn_batch_norm():
    model = LinenCNN()
    x, y = normal(1, 2, 10, 10, 2), integers(2, 3, 2)
    variables = filled(jax.eval_shape(model.init, random_key(0), x))

    def loss(params, stats, x, y):
        logits, updated = model.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
        return cross_entropy(logits, y) + optax.tree.norm(updated["batch_stats"], squared=True)

    return loss, (variables["params"], variables["batch_stats"], x, y)


@FAMILY()
def linen_lstm():
    model = nn.Sequential([nn.RNN(nn.OptimizedLSTMCell(4, param_dtype=float)), nn.Dense(1)])
    x = normal(1, 2, 5, 3)
    params = filled(jax.eval_shape(model.init, random_key(0), x))
    return lambda params, x: jnp.mean(optax.huber_loss(model.apply(params, x))), (params, x)


@FAMILY()
def linen_gru_bidirectional():
    forth, back = (nn.RNN(nn.GRUCell(3, param_dtype=float)) for _ in range(2))
    model = nn.Bidirectional(forth, back)
    x = normal(1, 2, 4, 2)
    params = filled(jax.eval_shape(model.init, random_key(0), x))
    return lambda params, x: jnp.sum(model.apply(params, x) ** 2), (params, x)


class LinenBlock(nn.Module):
    dropout: float = 0.2

    @nn.compact
    def __call__(self, x, _=None):
        attention = nn.MultiHeadDotProductAttention(
            num_heads=2, dropout_rate=self.dropout, deterministic=False
        )
        mask = nn.make_causal_mask(x[..., 0])
        x = x + attention(nn.LayerNorm()(x), mask=mask)
        hidden = nn.gelu(nn.Dense(8)(nn.RMSNorm()(x)))
        return x + nn.Dropout(self.dropout, deterministic=False)(nn.Dense(x.shape[-1])(hidden)), None


class LinenTransformer(nn.Module):
    """Tied embedding; one block, or several under `nn.remat` and `nn.scan`."""

    layers: int = 1

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(7, 4)
        x = embed(tokens) + self.param("position", nn.initializers.normal(), (tokens.shape[1], 4))
        block = LinenBlock
        if self.layers > 1:
            block = nn.scan(
                nn.remat(LinenBlock, prevent_cse=False),
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                length=self.layers,
            )
        x, _ = block()(x)
        return embed.attend(x)


def linen_transformer(layers):
    model = LinenTransformer(layers)
    tokens = integers(1, 7, 2, 5)
    keys = {"params": random_key(0), "dropout": random_key(1)}
    params = filled(jax.eval_shape(model.init, keys, tokens))

    def loss(params, tokens, key):
        logits = model.apply(params, tokens, rngs={"dropout": key})
        return cross_entropy(logits[:, :-1], tokens[:, 1:])

    return loss, (params, tokens, random_key(2))


@FAMILY()
def linen_transformer_dropout():
    return linen_transformer(1)


@FAMILY()
def linen_remat_scan_over_layers():
    return linen_transformer(3)


@FAMILY(tolerance=5e-2, twice=False)
def linen_mixed_precision():
    """Float32 parameters, bfloat16 arithmetic, float32 loss."""
    model = nn.Sequential(
        [nn.Dense(6, dtype=jnp.bfloat16), nn.tanh, nn.LayerNorm(dtype=jnp.bfloat16), nn.Dense(3)]
    )
    x, y = normal(1, 4, 5).astype(jnp.float32), integers(2, 3, 4)
    params = filled(jax.eval_shape(model.init, random_key(0), x), jnp.float32)
    return lambda params, x, y: cross_entropy(model.apply(params, x).astype(jnp.float32), y), (params, x, y)


# --- Flax nnx ---------------------------------------------------------------------------------


def split_nnx(make):
    """`(params, rest) -> model`, the parameters, and everything else that the model holds."""
    graph, params, rest = nnx.split(nnx.eval_shape(make), nnx.Param, ...)
    # A merged model mutates its variables, so it needs its own.
    return lambda *states: nnx.merge(graph, *states, copy=True), filled(params), filled(rest)


@FAMILY()
def nnx_mlp_dropout():
    def make():
        rngs = nnx.Rngs(0, dropout=1)
        return nnx.Sequential(
            nnx.Linear(5, 6, rngs=rngs), nnx.LayerNorm(6, rngs=rngs), jax.nn.silu,
            nnx.Dropout(0.3, rngs=rngs), nnx.Linear(6, 3, rngs=rngs),
        )  # fmt: skip

    merge, params, rest = split_nnx(make)

    def loss(params, rest, x, y):
        return cross_entropy(merge(params, rest)(x), y)

    return loss, (params, rest, normal(1, 4, 5), integers(2, 3, 4))


@FAMILY()
def nnx_cnn_batch_norm():
    def make():
        rngs = nnx.Rngs(0)
        return nnx.Sequential(
            nnx.Conv(2, 4, (3, 3), rngs=rngs), nnx.BatchNorm(4, rngs=rngs), jax.nn.softplus,
            lambda x: nnx.max_pool(x, (3, 3), strides=(2, 2)), nnx.GroupNorm(4, 2, rngs=rngs),
            lambda x: x.mean((1, 2)), nnx.Linear(4, 3, rngs=rngs),
        )  # fmt: skip

    merge, params, rest = split_nnx(make)

    def loss(params, rest, x, y):
        merged = merge(params, rest)
        value = cross_entropy(merged(x), y)
        statistics = jax.tree.leaves(nnx.state(merged, nnx.BatchStat))
        return value + sum(jnp.sum(s**2) for s in statistics)

    return loss, (params, rest, normal(1, 2, 7, 7, 2), integers(2, 3, 2))


@FAMILY()
def nnx_gru():
    merge, params, rest = split_nnx(
        lambda: nnx.RNN(nnx.GRUCell(3, 4, param_dtype=float, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    )

    def loss(params, rest, x):
        return jnp.sum(merge(params, rest)(x) ** 2)

    return loss, (params, rest, normal(1, 2, 4, 3))


# --- Equinox ----------------------------------------------------------------------------------


def equinox_loss(make, loss):
    """`loss(model, …)` as a function of the model's arrays, and these."""
    model = filled(eqx.filter_eval_shape(make, random_key(0)))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    return lambda params, *args: loss(eqx.combine(params, static), *args), params


@FAMILY()
def equinox_mlp():
    loss, params = equinox_loss(
        lambda key: eqx.nn.MLP(5, 3, 6, 2, activation=jnp.tanh, key=key),
        lambda model, x, y: cross_entropy(jax.vmap(model)(x), y),
    )
    return loss, (params, normal(1, 4, 5), integers(2, 3, 4))


@FAMILY()
def equinox_cnn():
    def make(key):
        return eqx.nn.Sequential(
            [
                eqx.nn.Conv2d(2, 4, 3, key=key), eqx.nn.Lambda(jax.nn.elu), eqx.nn.MaxPool2d(2, 2),
                eqx.nn.ConvTranspose2d(4, 3, 2, key=key), eqx.nn.GroupNorm(3, 3), eqx.nn.AvgPool2d(2, 2),
                eqx.nn.Lambda(jnp.ravel), eqx.nn.Dropout(0.2), eqx.nn.Linear(12, 3, key=key),
            ]
        )  # fmt: skip

    def on_batch(model, x, y, key):
        logits = jax.vmap(lambda x, key: model(x, key=key))(x, jax.random.split(key, len(x)))
        return cross_entropy(logits, y)

    loss, params = equinox_loss(make, on_batch)
    return loss, (params, normal(1, 2, 2, 8, 8), integers(2, 3, 2), random_key(3))


@FAMILY()
def equinox_lstm_attention():
    def make(key):
        return eqx.nn.LSTMCell(3, 4, key=key), eqx.nn.MultiheadAttention(2, 4, key=key)

    def on_sequence(model, x):
        cell, attention = model

        def step(carry, x):
            carry = cell(x, carry)
            return carry, carry[0]

        _, hidden = jax.lax.scan(step, (jnp.zeros(4), jnp.zeros(4)), x)
        return jnp.sum(attention(hidden, hidden, hidden) ** 2)

    loss, params = equinox_loss(make, on_sequence)
    return loss, (params, normal(1, 5, 3))


# --- Haiku ------------------------------------------------------------------------------------


def haiku(forward, *args):
    """A transformed Haiku function, its parameters and its state."""
    model = hk.transform_with_state(forward)
    return model.apply, *filled(jax.eval_shape(model.init, random_key(0), *args))


@FAMILY()
def haiku_mlp_dropout():
    x, y = normal(1, 4, 5), integers(2, 3, 4)

    def forward(x):
        return hk.nets.MLP([6, 6, 3])(x, dropout_rate=0.2, rng=hk.next_rng_key())

    apply, params, state = haiku(forward, x)

    def loss(params, state, key, x, y):
        return cross_entropy(apply(params, state, key, x)[0], y)

    return loss, (params, state, random_key(1), x, y)


@FAMILY()
def haiku_cnn_batch_norm():
    x, y = normal(1, 2, 8, 8, 2), integers(2, 3, 2)

    def forward(x):
        x = hk.Conv2D(3, 3)(x)
        x = hk.BatchNorm(True, True, 0.9)(x, is_training=True)
        x = hk.max_pool(jax.nn.leaky_relu(x), (2, 2, 1), (2, 2, 1), "SAME")
        return hk.Linear(3)(hk.Flatten()(hk.avg_pool(x, (2, 2, 1), (2, 2, 1), "VALID")))

    apply, params, state = haiku(forward, x)

    def loss(params, state, x, y):
        return cross_entropy(apply(params, state, None, x)[0], y)

    return loss, (params, state, x, y)


@FAMILY()
def haiku_lstm_layer_stack():
    x = normal(1, 5, 2, 4)

    def forward(x):
        hidden, _ = hk.dynamic_unroll(hk.LSTM(4), x, hk.LSTM(4).initial_state(2))
        stack = hk.experimental.layer_stack(2)
        return stack(lambda h: h + jax.nn.sigmoid(hk.Linear(4)(hk.LayerNorm(-1, True, True)(h))))(hidden)

    apply, params, state = haiku(forward, x)
    return lambda params, state, x: jnp.mean(apply(params, state, None, x)[0] ** 2), (params, state, x)


# --- optax ------------------------------------------------------------------------------------


@FAMILY()
def optax_losses():
    """Every loss of the parameters, several at the same predictions."""

    def loss(w, x, labels, signs):
        logits = x @ w
        one_hot = jax.nn.one_hot(labels, 3, dtype=float)
        positive = optax.projections.projection_simplex(logits[0])
        return (
            optax.sigmoid_binary_cross_entropy(logits, one_hot).mean()
            + optax.safe_softmax_cross_entropy(logits, optax.smooth_labels(one_hot, 0.1)).mean()
            + optax.sigmoid_focal_loss(logits, one_hot).mean()
            + optax.losses.multiclass_perceptron_loss(logits, labels).mean()
            + optax.kl_divergence(jax.nn.log_softmax(logits), jax.nn.softmax(x[:, :3])).mean()
            + optax.hinge_loss(logits[:, 0], signs).mean()
            + optax.log_cosh(logits, one_hot).mean()
            + optax.cosine_distance(logits, x[:, :3]).mean()
            + optax.ctc_loss(
                logits[None], jnp.zeros((1, 4)), labels[None, :2] % 2 + 1, jnp.zeros((1, 2))
            ).mean()
            + jnp.sum(positive**2)
        )

    return loss, (normal(0, 5, 3), normal(1, 4, 5), integers(2, 3, 4), jnp.array([1.0, -1.0, 1.0, -1.0]))
