"""A picture as a person takes it in: modules and layers first, without what is no mathematics."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from drawn_models import shape

import funcprop as fp


def _block(D: int) -> dict[str, Any]:
    return {name: jnp.ones((D, D)) for name in ("q", "k", "v", "o", "up", "down")} | {"g": jnp.ones(D)}


def _plain_block(p, x):
    h = x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * p["g"]
    scores = jax.nn.softmax((h @ p["q"]) @ (h @ p["k"]).T)
    x = x + scores @ (h @ p["v"]) @ p["o"]
    return x + jax.nn.gelu(x @ p["up"]) @ p["down"]


def test_plain_networks_are_drawn_by_their_layers():
    """Blocks in a list are a node each; what reads the matrices of one flat dictionary is a node for each."""
    from funcprop.drawing.levels import MOST_NODES

    def of_blocks(blocks, x):
        for p in blocks:
            x = _plain_block(p, x)
        return jnp.sum(x**2)

    x = jnp.ones((5, 4))
    for function, params, wanted in (
        (of_blocks, [_block(4) for _ in range(4)], {"blocks/0"}),
        (
            lambda p, x: jnp.sum(_plain_block(p, _plain_block(p, x))),
            _block(4),
            {"q", "o", "up", "down", "loss"},
        ),
    ):
        picture = fp.draw(fp.trace(function)(params, x)).picture
        labels = {node.label for node in picture.nodes}
        assert len(picture.nodes) <= MOST_NODES
        assert not any(label.startswith("operators") for label in labels)
        assert wanted <= labels | {label.split(" ")[0] for label in labels}


def test_what_one_encoder_reads_twice_is_seen():
    """Blocks side by side that read arguments of their own are not one: no argument vanishes."""

    def loss(p, first, second):
        encode = lambda x: jax.nn.relu(x @ p["W1"] + p["b1"]) @ p["W2"]  # noqa: E731
        return jnp.sum(jnp.concatenate([encode(first), encode(second)]) ** 2)

    p = {"W1": jnp.ones((6, 8)), "b1": jnp.ones(8), "W2": jnp.ones((8, 4))}
    labels = {n.label for n in fp.draw(fp.trace(loss)(p, jnp.ones((5, 6)), jnp.ones((5, 6)))).picture.nodes}
    assert {"first", "second"} <= labels


def test_a_net_is_first_seen_as_its_modules():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.RNN(nn.OptimizedLSTMCell(6))(nn.Embed(9, 5)(x))[:, -1]
            return nn.Dense(3)(x)

    net, x = Net(), jnp.ones((2, 4), int)
    params = jax.jit(net.init)(jax.random.key(0), x)
    picture = fp.draw(fp.trace(lambda p, x: jnp.sum(net.apply(p, x) ** 2))(params, x)).picture
    assert {"Embed_0", "RNN_0", "Dense_0"} <= {node.label for node in picture.nodes}


def test_a_module_that_is_nearly_all_of_the_net_is_opened():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(3):
                x = x + nn.Dense(8)(nn.gelu(nn.LayerNorm()(x)))
            return x

    class Body(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(10, 8, name="embedding")(tokens)
            for i in range(3):
                x = Block(name=f"block_{i}")(x)
            return nn.LayerNorm(name="norm")(x)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            return nn.Dense(10, name="head")(Body(name="body")(tokens))

    model, tokens = Model(), jnp.zeros((2, 5), int)
    params = jax.jit(model.init)(jax.random.key(0), tokens)
    graph = fp.trace(lambda params, tokens: model.apply(params, tokens).mean())(params, tokens)
    seen = [(node.label, node.count) for node in fp.draw(graph).picture.nodes if node.kind == "scope"]
    assert seen == [("embedding", 1), ("block_0 … block_2", 3), ("norm", 1), ("head", 1)]


def test_what_is_computed_on_the_way_is_not_called_by_the_name_of_the_loss():
    def loss(p, x, key):
        mu, width = x @ p["mu"]["W"] + p["mu"]["b"], x @ p["width"]["W"] + p["width"]["b"]
        z = mu + jnp.exp(width / 2) * jax.random.normal(key, mu.shape)
        out = z @ p["out"]["W"] + p["out"]["b"]
        logits = jax.nn.log_softmax(out) - jnp.log1p(jnp.exp(mu).sum(-1, keepdims=True))
        return jnp.mean(logits**2) - jnp.mean(1 + width - mu**2 - jnp.exp(width))

    layer = lambda a, b: {"W": jnp.ones((a, b)), "b": jnp.ones(b)}  # noqa: E731
    p = {"mu": layer(9, 2), "width": layer(9, 2), "out": layer(2, 9)}
    labels = [n.label for n in fp.draw(fp.trace(loss)(p, jnp.ones((4, 9)), jax.random.key(0))).picture.nodes]
    assert labels.count("loss") <= 1


def test_what_is_no_mathematics_is_not_drawn():
    """Types, axes of length 1, wrapped indices, guards, checkpoints, and a sum divided by its count."""

    @jax.checkpoint
    def layer(w, x):
        return jnp.tanh(x @ w)

    def loss(w, table, tokens, y):
        logits = layer(w, table[tokens]) + jnp.ones(3)
        picked = jnp.take_along_axis(logits, y[:, None], 1)[:, 0]
        return jnp.mean(jax.nn.logsumexp(logits, -1) - picked)

    graph = fp.trace(loss)(jnp.ones((4, 3)), jnp.ones((9, 4)), jnp.arange(5), jnp.zeros(5, int))
    labels = [n.label for n in fp.draw(graph, unnamed=False).picture.nodes if n.kind == "operator"]
    assert labels == [
        "gather",
        "×",
        "tanh",
        "+",
        "gather",
        "max",
        "stop",
        "−",
        "exp",
        "Σ",
        "|·|",
        "log",
        "+",
        "−",
        "mean",
    ]
    every = {n.label for n in fp.draw(graph, dead=True).picture.nodes if n.kind == "operator"}
    assert {"broadcast", "where", "remat2", "is finite"} <= every


def test_what_a_graph_is_made_of_is_no_parameter():
    def loss(p, graph):
        with jax.named_scope("net"):
            nodes, senders = graph
            h = jnp.tanh(nodes[senders] @ p["net"]["w"])
            h = jnp.tanh(h @ p["net"]["v"])
        return jnp.sum(h**2)

    p = {"net": {"w": shape(3, 4), "v": shape(4, 4)}}
    picture = fp.draw(fp.trace(loss)(p, (shape(5, 3), shape(7, dtype="int32"))), depth=0).picture
    assert {"graph/0", "graph/1"} <= {n.label for n in picture.nodes}
    assert any("28 parameters" in n.brief for n in picture.nodes)


def test_dropout_before_a_normalisation_is_not_in_it():
    def loss(p, x, key):
        h = x @ p["first"]["kernel"]
        h = jnp.where(jax.random.bernoulli(key, 0.9, h.shape), h / 0.9, 0.0)
        h = (h - h.mean(0)) * jax.lax.rsqrt(h.var(0) + 1e-5) * p["norm"]["scale"]
        return jnp.sum((h @ p["last"]["kernel"]) ** 2)

    p = {"first": {"kernel": shape(3, 4)}, "norm": {"scale": shape(4)}, "last": {"kernel": shape(4, 2)}}
    shown = fp.draw(fp.trace(loss)(p, shape(5, 3), jax.random.key(0)), depth=0).shown
    scopes = {op.op: op.scope for op in shown.graph}
    assert scopes["rsqrt"] == "norm" != scopes["random_bits"]


def test_data_that_a_loss_holds_are_no_parameters_of_it() -> None:
    """Arguments with a path are parameters; then what the function was given otherwise is data."""

    def network(params: Any, x: Any) -> Any:
        for layer in params.values():
            x = jax.nn.relu(x @ layer["w"] + layer["b"])
        return x

    sizes = [4, *[6] * 8, 50]
    params = {
        f"layer_{i}": {"w": jnp.ones((a, b)), "b": jnp.zeros(b)} for i, (a, b) in enumerate(pairwise(sizes))
    }
    targets = jnp.ones((2, 50))

    def loss(params: Any, x: Any) -> Any:
        return optax.sigmoid_binary_cross_entropy(network(params, x), targets).sum(-1).mean()

    details = "".join(n.details for n in fp.draw(fp.trace(loss)(params, jnp.ones((2, 4)))).picture.nodes)
    assert "350 parameters" in details
    assert "100 parameters" not in details
