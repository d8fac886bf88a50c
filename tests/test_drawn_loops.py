"""Loops drawn open, and their operators by the transformation they came from."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import funcprop as fp
from funcprop.drawing.simplified import simplified

ORDERS = ("forward-over-reverse", "reverse-over-reverse")


def lstm(p: Any, x: Any) -> Any:
    def step(carry: Any, x_t: Any) -> Any:
        h, c = carry
        i, f, g, o = jnp.split(x_t @ p["W"] + h @ p["U"] + p["b"], 4)
        c = fp.name(jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g), "c")
        h = fp.name(jax.nn.sigmoid(o) * jnp.tanh(c), "h")
        return (h, c), h

    zeros = jnp.zeros(3)
    (h, _), hs = jax.lax.scan(step, (zeros, zeros), x)
    return jnp.sum(h**2) + jnp.sum(hs)


LSTM = {"W": jnp.ones((2, 12)), "U": jnp.ones((3, 12)), "b": jnp.ones(12)}
X = jnp.ones((5, 2))


def flax_rnn() -> tuple[Any, tuple[Any, ...]]:
    model, x = nn.RNN(nn.LSTMCell(3)), jax.ShapeDtypeStruct((1, 5, 2), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), x)

    def loss(params: Any, x: Any) -> Any:
        output: Any = model.apply(params, x)
        return jnp.sum(output**2)

    return loss, (params, x)


def all_operators(graph: Any) -> int:
    """With those inside of others, at any depth."""
    return len(graph.operators) + sum(all_operators(b) for op in graph.operators for b in op.bodies.values())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("model", ["lstm", "flax"])
def test_every_operator_in_a_loop_is_classified(model: str, order: str) -> None:
    fun, args = (lstm, (LSTM, X)) if model == "lstm" else flax_rnn()
    graph: Any = fp.second_order_graph(fun, order=order)(*args)
    assert len(graph.classes) == all_operators(graph) == sum(graph.count().values())
    assert {op.name for op in graph.operators} < set(graph.classes)
    assert min(graph.count().values()) > 0
    # Each has its own class where it is drawn, too.
    nodes = fp.draw(graph, loops=9, fold=False).picture.nodes
    drawn = {n.name: n.role for n in nodes if n.kind == "operator"}
    assert drawn.items() <= graph.classes.items()
    assert len([name for name in drawn if "[body]" in name]) > 40


def test_classes_in_a_loop_are_those_of_the_loop_unrolled() -> None:
    """Matrix products of one middle step, counted in the chain of steps without a loop."""

    def chain(W: Any, x: Any, count: int) -> Any:
        for _ in range(count):
            x = jnp.tanh(x @ W)
        return jnp.sum(x**2)

    def loop(W: Any, x: Any, count: int) -> Any:
        return jnp.sum(jax.lax.scan(lambda h, _: (jnp.tanh(h @ W), None), x, length=count)[0] ** 2)

    def products(fun: Any, count: int) -> Counter[str]:
        graph: Any = fp.second_order_graph(fun, rules=fp.rules.autodiff)(*arguments, count)
        return Counter(c for name, c in graph.classes.items() if "dot_general" in name)

    arguments = (jnp.ones((4, 4)), jnp.ones((5, 4)))
    unrolled = products(chain, 5) - products(chain, 4)
    # The loop carries the gradient, too, which no result needs: out of it, nothing can be left away.
    assert products(loop, 5) == unrolled + Counter({"cotangent": 1})


def arrows(picture: Any) -> dict[str, set[str]]:
    """What each node leads to, by label; squares by their names."""
    label = {n.key: n.label or n.name for n in picture.nodes}
    found = defaultdict(set)
    for e in picture.edges:
        found[label[e.source]].add(label[e.target] + "'" * (e.kind == "repeat"))
    return found


def test_a_scan_is_a_box_with_what_it_carries() -> None:
    def fun(W: Any, x: Any, h0: Any) -> Any:
        def step(h: Any, x_t: Any) -> Any:
            h = fp.name(jnp.tanh(W @ h + x_t), "h")
            return h, jnp.sin(h)

        return jax.lax.scan(step, h0, x)

    graph = fp.trace(fun)(jnp.ones((3, 3)), jnp.ones((7, 3)), jnp.ones(3))
    picture = fp.draw(graph).picture
    assert [box.label for box in picture.boxes] == ["scan × 7"]
    inside = {n.label or n.name for n in picture.nodes if n.box == picture.boxes[0].key}
    assert {"h[t−1]", "x[t]", "×", "+", "tanh", "h", "sin"} <= inside
    assert not inside & {"W", "x", "scan", "scan_1"}
    found = arrows(picture)
    assert found["W"] == {"×"}
    assert found["x"] == {"x[t]"}
    assert found["x[t]"] == {"+"}
    assert found["h[t−1]"] == {"×"}
    # The next carry, the last one, and one step of what is stacked.
    results = [v.name for v in graph.outputs]
    assert found["h"] == {"h[t−1]'", "sin", results[0]}
    assert found["scan[body]/sin"] == {results[1]}
    closed = fp.draw(graph, loops=0).picture
    assert [n.label for n in closed.nodes if n.kind == "operator"] == ["scan"]
    collapsed = fp.draw(graph, depth=0).picture
    assert [n.label for n in collapsed.nodes if n.kind == "scope"] == ["scan × 7"]
    assert {e.kind for e in collapsed.edges} == {"flow"}
    assert arrows(collapsed)["scan × 7"] == set(results)


def test_condition_body_and_branches_are_boxes() -> None:
    def fun(x: Any) -> Any:
        _, x = jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.sin(s[1]) * x), (0, x))
        return jax.lax.cond(x[0] > 0, jnp.cos, jnp.exp, x)

    picture = fp.draw(fp.trace(fun)(jnp.ones(3))).picture
    parent: dict[Any, str] = {b.key: b.label for b in picture.boxes}
    assert [(b.label, parent.get(b.parent)) for b in picture.boxes] == [
        ("while", None),
        ("condition", "while"),
        ("body", "while"),
        ("cond", None),
        ("branch 0", "cond"),
        ("branch 1", "cond"),
    ]
    places = {n.label: parent.get(n.box) for n in picture.nodes if n.kind == "operator"}
    assert places["<"] == "condition"
    assert (places["sin"], places["exp"], places["cos"]) == ("body", "branch 0", "branch 1")
    assert sum(e.kind == "repeat" for e in picture.edges) == 2
    (cond,) = (n.key for n in picture.nodes if n.label == "cond")
    assert sum(e.target == cond for e in picture.edges) == 3


@pytest.mark.parametrize("depth", [None, 0])
def test_residuals_of_open_loops_are_those_of_the_graph(depth: int | None) -> None:
    graph = fp.backward_graph(lstm)(LSTM, X)
    picture = fp.draw(graph, depth=depth, loops=1).picture
    assert {box.label for box in picture.boxes} >= {"forward", "backward"}
    labels = {b.label for b in picture.boxes} | {n.label for n in picture.nodes}
    assert {"scan × 5", "scan × 5, backwards"} <= labels
    assert sum(e.nbytes or 0 for e in picture.edges if e.kind == "residual") == graph.residual_bytes
    # Nothing reaches the backward sweep but as a residual.
    boxes = {b.key: b for b in picture.boxes}

    def section(box: str | None) -> str:
        while box is not None and boxes[box].parent is not None:
            box = boxes[box].parent
        return "" if box is None else boxes[box].label

    side = {n.key: section(n.box) for n in picture.nodes}
    crossing = [e for e in picture.edges if (side[e.source], side[e.target]) == ("forward", "backward")]
    assert crossing
    assert {e.kind for e in crossing} == {"residual"}


def test_a_large_loop_stays_closed_until_it_is_asked_for() -> None:
    def fun(x: Any) -> Any:
        def step(c: Any, _: Any) -> Any:
            for _ in range(60):
                c = jnp.sin(c)
            return c, None

        return jax.lax.scan(step, x, None, length=3)[0]

    graph = fp.trace(fun)(1.0)
    assert not fp.draw(graph).picture.boxes
    opened = fp.draw(graph, loops=1)
    assert len(opened.picture.nodes) > 60
    assert re.search("scan × 3", opened.svg())


def test_loops_in_repeated_blocks_fold() -> None:
    def fun(ws: Any, x: Any) -> Any:
        for i, w in enumerate(ws):
            with jax.named_scope(f"block{i}"):
                x = jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, w)[0]
        return x

    graph = fp.trace(fun)([jnp.ones((4, 2, 2))] * 3, jnp.ones((2, 2)))
    picture = fp.draw(graph).picture
    assert [(b.label, b.count) for b in picture.boxes] == [("block0 … block2", 3), ("scan × 4", 1)]
    assert [n.label for n in picture.nodes if n.kind == "operator"] == ["×", "tanh"]
    (weights,) = (n for n in picture.nodes if n.name == "ws/0")
    assert weights.members == ("ws/0", "ws/1", "ws/2")
    assert sum(e.kind == "repeat" for e in picture.edges) == 2


# --- repetition that nobody named -------------------------------------------------------------


class Layer(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.norm, self.late = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, width, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(width, 8, rngs=rngs), nnx.Linear(8, width, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = x + self.attention(self.norm(x))
        return x + self.down(nnx.gelu(self.up(self.late(x))))


class Transformer(nnx.Module):
    def __init__(self, depth: int, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(7, 4, rngs=rngs)
        self.place = nnx.Param(jnp.zeros((3, 4)))
        self.layers = nnx.List([Layer(4, rngs) for _ in range(depth)])
        self.head = nnx.Linear(4, 7, rngs=rngs)

    def __call__(self, tokens: Any) -> Any:
        x = self.embed(tokens) + self.place
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def transformer(depth: int) -> fp.Graph:
    definition, state = nnx.split(nnx.eval_shape(lambda: Transformer(depth, nnx.Rngs(0))))
    tokens = jax.ShapeDtypeStruct((2, 3), jnp.int32)
    return fp.trace(lambda state, tokens: nnx.merge(definition, state)(tokens))(state, tokens)


def test_blocks_without_scopes_fold() -> None:
    """A model of nnx has none; they are the paths of its parameters."""
    graph = transformer(12)
    picture = fp.draw(graph, depth=9).picture
    (box,) = (b for b in picture.boxes if b.count > 1)
    assert (box.label, box.count) == ("layers/0 … layers/11", 12)
    assert len(picture.nodes) < 140 < len(graph.operators)
    # The whole layer, from its first operator to its residual sum: one more layer is one more block.
    per_layer = len(simplified(transformer(3))) - len(simplified(transformer(2)))
    inside = {box.key}
    for other in picture.boxes:
        inside |= {other.key} if other.parent in inside else set()
    folded = [n for n in picture.nodes if n.kind == "operator" and n.box in inside]
    assert len(folded) == per_layer
    assert {len(n.members) for n in folded} == {12}
    # One value comes into it from the layer before, and one goes on from it.
    own = {n.key for n in picture.nodes if n.box in inside}
    assert len({e.variable for e in picture.edges if e.target in own and e.source not in own}) == 1
    assert len({e.source for e in picture.edges if e.source in own and e.target not in own}) == 1
    assert len({e.variable for e in picture.edges if e.kind == "repeat"}) == 1
    # Parameters of all twelve are one square.
    (weight,) = (n for n in picture.nodes if re.search(r"layers/0/up/kernel", n.name))
    assert len(weight.members) == 12


def test_runs_that_are_wired_differently_do_not_fold() -> None:
    """The same operators in the same order, but every other block reads its input where the others do not."""

    def fun(x: Any, swap: bool) -> Any:
        for i in range(12):
            y = jnp.sin(x)
            z = jnp.cos(y)
            first, second = (y, x) if swap and i % 2 else (x, y)
            x = jnp.tanh(jnp.exp(first) * z + second)
        return x

    counts = [
        [b.count for b in fp.draw(fp.trace(fun)(jnp.ones(3), swap)).picture.boxes] for swap in (False, True)
    ]
    assert counts == [[12], [6]]
    # What does not read the block before is not its repetition.
    parallel = fp.trace(lambda xs: [jnp.tanh(jnp.exp(jnp.sin(jnp.cos(x)))) for x in xs])([jnp.ones(3)] * 12)
    assert not fp.draw(parallel).picture.boxes
