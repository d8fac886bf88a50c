"""A folded picture is the same function: unfolded again, it has the arrows of the graph."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn_models import MODELS, shape

import funcprop as fp
from funcprop.drawing.dot import box_label
from funcprop.drawing.picture import Edge, Node, Picture
from funcprop.drawing.simplified import simplified

# What is at both ends: its kind and its name.
Arrow = tuple[tuple[str, str], tuple[str, str]]


class Unfolding:
    """The arrows of a picture between operators, given values and results, every repetition by itself."""

    def __init__(self, picture: Picture) -> None:
        self.picture = picture
        self.boxes = {box.key: box for box in picture.boxes}
        self.nodes = {node.key: node for node in picture.nodes}

    def levels(self, node: Node) -> list[tuple[str, int]]:
        """The folded boxes around a node, from the outside; of a parameter those that have each its own."""
        found = []
        key = node.box
        while key is not None:
            box = self.boxes[key]
            found += [(key, box.count)] if box.count > 1 else []
            key = box.parent
        found.reverse()
        if node.kind == "variable":
            depths = range(len(found) + 1)
            fitting = [n for n in depths if math.prod(c for _, c in found[:n]) == len(node.members)]
            return found[: fitting[-1]] if fitting else []
        assert math.prod(c for _, c in found) == len(node.members)
        return found

    def name(self, node: Node, index: tuple[int, ...]) -> tuple[str, str]:
        counts = [count for _, count in self.levels(node)]
        flat = 0
        for i, count in zip(index, counts, strict=True):
            flat = flat * count + i
        return node.kind, node.members[flat]

    def arrows(self, edge: Edge) -> set[Arrow]:
        """The arrow as one for every pair of repetitions, by the names of what is at its ends."""
        source, target = self.nodes[edge.source], self.nodes[edge.target]
        out, into = self.levels(source), self.levels(target)
        assert "some" not in edge.leaves + edge.enters
        shared = len(out) - len(edge.leaves)
        if target.kind == "variable" and not into and len(target.members) > 1:
            # The results of all repetitions share a square.
            assert edge.leaves == ("every",) * len(out)
            indices = itertools.product(*(range(count) for _, count in out))
            return {(self.name(source, i), ("variable", target.members[n])) for n, i in enumerate(indices)}
        assert out[:shared] == into[:shared]
        assert shared == len(into) - len(edge.enters), edge
        found = set()
        for common in itertools.product(*(range(count) for _, count in out[:shared])):
            after = common
            if edge.kind == "repeat":
                after = (*common[:-1], common[-1] + 1)
                if after[-1] == out[shared - 1][1]:
                    continue
            left = zip(out[shared:], edge.leaves, strict=True)
            entered = zip(into[shared:], edge.enters, strict=True)
            starts = [[n - 1] if word == "last" else range(n) for (_, n), word in left]
            ends = [[0] if word == "first" else range(n) for (_, n), word in entered]
            for a, b in itertools.product(itertools.product(*starts), itertools.product(*ends)):
                if self.is_meant(edge, a, b, [n for _, n in into[shared:]]):
                    found.add((self.name(source, common + a), self.name(target, after + b)))
        return found

    def is_meant(self, edge: Edge, a: Any, b: Any, counts: list[int]) -> bool:
        left = [i for i, word in zip(a, edge.leaves, strict=True) if word == "each"]
        entered = [
            n - 1 - i if "backwards" in word else i
            for i, n, word in zip(b, counts, edge.enters, strict=True)
            if word.startswith("each")
        ]
        return left == entered

    def between_operators(self, results: set[str]) -> set[Arrow]:
        """All arrows, without the squares of what is computed on the way."""
        pairs = [pair for edge in self.picture.edges for pair in self.arrows(edge)]
        made = {b: a for a, b in pairs if b[0] == "variable"}
        return {(made.get(a, a), b) for a, b in pairs if b[0] == "operator" or b[1] in results}


def expected(graph: fp.Graph) -> set[Arrow]:
    """From operator to operator, from given values to operators, and from operators to results."""
    made = {v.name: ("operator", op.name) for op in graph.operators for v in op.outputs}
    found = {
        (made.get(v.name, ("variable", v.name)), ("operator", op.name))
        for op in graph.operators
        for v in op.inputs
        if v.kind != "literal"
    }
    return found | {(made[v.name], ("variable", v.name)) for v in graph.outputs if v.name in made}


def assert_true(graph: fp.Graph, **options: Any) -> Picture:
    picture = fp.draw(graph, **{"depth": 99, "loops": 0, "unnamed": False, "dead": True, **options}).picture
    assert Unfolding(picture).between_operators({v.name for v in graph.outputs}) == expected(graph)
    return picture


@pytest.mark.sampled(11)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_folded_unfolds_to_the_same_function(name: str) -> None:
    assert_true(MODELS[name]())


@pytest.mark.parametrize("name", ["graphnet", "resnet", "unet", "haiku_resnet"])
def test_blocks_of_other_sizes_unfold_to_the_same_function(name: str) -> None:
    picture = assert_true(MODELS[name](), fold="sizes")
    assert any(box.sizes_differ and "sizes differ" in box_label(box) for box in picture.boxes)


@pytest.mark.sampled(11)
@pytest.mark.parametrize("name", MODELS)
def test_a_picture_and_all_that_open_in_it_have_few_nodes(name: str) -> None:
    """Every operator of the first repetition is a circle in just one of the pictures."""
    graph = MODELS[name]()
    waiting, drawn = [fp.draw(graph)], Counter[str]()
    while waiting:
        drawing = waiting.pop()
        nodes = drawing.picture.nodes
        assert len(nodes) <= 60
        assert {n.key for n in nodes if n.kind == "scope"} == drawing.inside.keys()
        drawn.update(n.name for n in nodes if n.kind == "operator")
        waiting += drawing.inside.values()
    assert set(drawn.values()) == {1}
    live = {op.name for op in fp.draw(graph, fold=False, depth=99).shown.graph}
    assert set(drawn) <= live
    folded = {n.name for n in fp.draw(graph, fold="sizes", depth=99).picture.nodes if n.kind == "operator"}
    assert len(drawn) >= len(folded)


def random_program(seed: int) -> fp.Graph:
    """Blocks of a few kinds, one after another or side by side, that read what is there at random."""
    random = np.random.default_rng(seed)
    kinds = [[random.integers(5) for _ in range(random.integers(2, 6))] for _ in range(2)]
    plan = [
        (int(random.integers(2)), int(random.integers(1, 4)), bool(random.integers(2)), random.random(4))
        for _ in range(random.integers(4, 9))
    ]
    unary = [jnp.sin, jnp.tanh, jnp.exp, jnp.cosh, jnp.sinh]

    def fun(ws: Any, x: Any) -> Any:
        values, used = [x], iter(ws * 9)
        for number, (kind, times, is_chain, chance) in enumerate(plan):
            start = values[int(chance[0] * len(values))]
            for i in range(times):
                y = start = values[-1] if is_chain else start
                with jax.named_scope(f"part{number}_{i}") if chance[1] < 0.6 else contextlib.nullcontext():
                    for k in kinds[kind]:
                        y = unary[k](y)
                    y = y * next(used) if chance[2] < 0.5 else y - ws[0]
                    y = y + start if chance[3] < 0.5 else y
                values.append(y)
        return sum(v * (0.5 if seed % 2 else 1.0) for v in values[:: 1 + seed % 3])

    return fp.trace(fun)([shape(3)] * 4, shape(3))


@pytest.mark.parametrize("types", [True, False])
def test_random_programs_stay_what_they_are(types: bool) -> None:
    folded = 0
    for seed in range(60):
        graph = random_program(seed)
        picture = assert_true(graph, fold=True if types else "sizes")
        folded += any(box.count > 1 for box in picture.boxes)
    assert folded > 10


def test_siblings_that_are_read_differently_stay_apart() -> None:
    """Query, key and value; mean and logarithm of the variance; actor and critic; a difference of towers."""
    for name, labels in {
        "transformer": ("query", "key", "value"),
        "vae": ("mean", "logvar"),
        "actor_critic": ("actor", "critic"),
        "two_towers": ("left", "right"),
    }.items():
        boxes = fp.draw(MODELS[name](), depth=99).picture.boxes
        assert {box.label for box in boxes} >= set(labels)


def test_siblings_that_are_read_in_the_same_role_are_drawn_once() -> None:
    def fun(ws: Any, x: Any) -> Any:
        heads = []
        for i, w in enumerate(ws):
            with jax.named_scope(f"head{i}"):
                heads.append(jnp.tanh(jnp.sinh(x @ w)))
        return jnp.concatenate(heads)

    picture = assert_true(fp.trace(fun)([shape(4, 4)] * 3, shape(2, 4)))
    assert [(box.label, box.count) for box in picture.boxes] == [("head0 … head2", 3)]
    (out,) = (e for e in picture.edges if e.leaves)
    assert out.leaves == ("every",)
    assert "from every repetition" in out.tooltip


def test_a_value_that_is_read_from_the_middle_ends_a_repetition() -> None:
    picture = assert_true(MODELS["pyramid"]())
    assert [box.count for box in picture.boxes if box.count > 1] == [3, 3]


def test_results_of_every_block_are_one_square() -> None:
    def fun(ws: Any, x: Any) -> Any:
        found = []
        for i, w in enumerate(ws):
            with jax.named_scope(f"layer{i}"):
                x = jnp.tanh(x @ w) + x
            found.append(x)
        return found

    picture = assert_true(fp.trace(fun)([shape(4, 4)] * 5, shape(2, 4)))
    assert [box.count for box in picture.boxes] == [5]
    (result,) = (n for n in picture.nodes if n.key == "v:layer0/add")
    assert len(result.members) == 5
    last = assert_true(fp.trace(lambda ws, x: fun(ws, x)[-1])([shape(4, 4)] * 5, shape(2, 4)))
    assert [box.count for box in last.boxes] == [5]
    assert last.goal == "v:layer4/add"


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_simplified_and_folded_is_the_simplified_function(name: str) -> None:
    graph = simplified(MODELS[name]())
    assert_true(graph)


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_constants_of_equal_blocks_that_differ_stay_apart(factor):
    def fun(x):
        for i in range(4):
            with jax.named_scope(f"block{i}"):
                x = jnp.sinh(jnp.tanh(x * jnp.full(3, 2 * factor**i)))
        return x

    counts = [box.count for box in fp.draw(fp.trace(fun)(shape(3)), depth=9).picture.boxes]
    assert counts == ([4] if factor == 1 else [1, 1, 1, 1])
