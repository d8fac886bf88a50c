"""Pictures: the chapter's figure, boxes and folding."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from pictures import ENGINES, SVG, chapter, elements, stack

import funcprop as fp
from funcprop.cli.target import chapter_example
from funcprop.drawing.simplified import simplified


def centre(group: Any) -> tuple[float, float]:
    """Where a square or circle stands; y goes down."""
    rectangle, ellipse = group.find(f"{SVG}rect"), group.find(f"{SVG}ellipse")
    if ellipse is not None:
        return float(ellipse.get("cx")), float(ellipse.get("cy"))
    x, y, w, h = (float(rectangle.get(k)) for k in ("x", "y", "width", "height"))
    return x + w / 2, y + h / 2


FIGURE = """
W1 × z, x × z, z φ h, h × o, W2 × o, o l L, y l L, W1 ‖·‖²_F s, W2 ‖·‖²_F s, λ ‖·‖²_F s, L + J, s + J
"""


def test_the_chapters_figure() -> None:
    picture = fp.draw(chapter()).picture
    squares = {n.label for n in picture.nodes if n.kind == "variable"}
    assert squares == {"x", "W1", "z", "h", "W2", "o", "y", "L", "s", "λ", "J"}
    circles = [n.label for n in picture.nodes if n.kind == "operator"]
    assert sorted(circles) == sorted(["×", "φ", "×", "l", "‖·‖²_F", "+"])
    labels = {n.key: n.label for n in picture.nodes}
    outgoing = {e.source: e.target for e in picture.edges if labels[e.source] in circles}
    arrows = {
        (labels[e.source], labels[e.target], labels[outgoing[e.target]])
        for e in picture.edges
        if e.target in outgoing
    }
    assert arrows == {tuple(arrow.split()) for arrow in FIGURE.strip().split(", ")}
    assert len(picture.edges) == 12 + 6
    z = next(e for e in picture.edges if e.variable == "z")
    assert (z.shape, z.dtype, z.nbytes) == ((3,), "float64", 24)
    assert not picture.boxes


@pytest.mark.parametrize("engine", ENGINES)
def test_the_input_is_lower_left_and_the_objective_upper_right(engine: Any) -> None:
    svg = fp.draw(chapter(), engine=engine).svg()
    at = {name: centre(g) for name, g in elements(svg, "variable").items()}
    assert all(at["J"][0] > x for name, (x, _) in at.items() if name != "J")
    assert all(at["x"][0] <= x + 1 for x, _ in at.values())  # W1 is above it
    assert at["J"][1] < at["x"][1]
    order = [at[name][0] for name in ("x", "z", "h", "o", "L", "J")]
    assert order == sorted(order)
    assert "W1: float64[3,4], 96 B" in svg


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_overlaps(engine: Any) -> None:
    drawing = fp.draw(fp.backward_graph(fp.models.chapter)(*chapter_example()), depth=0, engine=engine)
    svg = drawing.svg()
    boxes = []
    for kind in ("variable", "operator", "scope"):
        for group in elements(svg, kind).values():
            x, y = centre(group)
            shape = group.find(f"{SVG}rect")
            if shape is not None:
                w, h = float(shape.get("width")) / 2, float(shape.get("height")) / 2
                boxes.append((x - w, y - h, x + w, y + h))
    assert len(boxes) > 15
    for i, (a, b, c, d) in enumerate(boxes):
        assert all(r <= a or x >= c or s <= b or y >= d for x, y, r, s in boxes[i + 1 :])


def test_the_hidden_bias_is_one_more_input_of_the_circle() -> None:
    params = fp.models.init_chapter(jax.random.key(0), inputs=4, hidden=3, outputs=2, bias=True)
    picture = fp.draw(fp.trace(fp.models.chapter)(params, *chapter_example()[1:])).picture
    assert {"× +", "×"} <= {n.label for n in picture.nodes}


# --- scopes -----------------------------------------------------------------------------------


def box_labels(picture: Any) -> dict[str, int]:
    return {box.label: box.count for box in picture.boxes}


def test_repeated_blocks_are_folded_to_one_with_their_number() -> None:
    twelve = fp.draw(stack(*[4] * 12)).picture
    assert box_labels(twelve)["Block_0 … Block_11"] == 12
    assert len(twelve.nodes) == len(fp.draw(stack(4, 4)).picture.nodes) < 40
    # What one block hands to the next is an arrow back to the block's beginning.
    assert {e.kind for e in twelve.edges} == {"flow", "repeat"}
    unfolded = fp.draw(stack(*[4] * 12), fold=False).picture
    assert sum(n.kind == "operator" for n in unfolded.nodes) == len(stack(*[4] * 12).operators)
    assert {e.kind for e in unfolded.edges} == {"flow"}


@pytest.mark.parametrize("depth", [None, 0])
def test_nodes_say_what_they_stand_for(depth: int | None) -> None:
    graph = stack(*[4] * 12)
    nodes = fp.draw(graph, depth=depth).picture.nodes
    operators = [name for node in nodes if node.kind != "variable" for name in node.members]
    assert sorted(operators) == sorted(op.name for op in simplified(graph).operators)
    produced = {v.name: v for v in graph.variables}
    for node in nodes:
        if node.kind == "variable":
            assert node.members[0] == node.name
            assert {produced[name].type for name in node.members} == {produced[node.name].type}


def test_only_equal_blocks_that_follow_each_other_are_folded() -> None:
    counts = box_labels(fp.draw(stack(4, 4, 5, 5, 5, 4), depth=9).picture)
    assert {k: n for k, n in counts.items() if k.startswith("Block")} == {
        "Block_0 … Block_1": 2,
        "Block_2 … Block_4": 3,
        "Block_5": 1,
    }


def test_siblings_that_repeat_together_are_one_block() -> None:
    def fun(x: Any) -> Any:
        for i in range(5):
            with jax.named_scope(f"norm{i}"):
                y = jnp.sinh(x)
            with jax.named_scope(f"mix{i}"):
                y = jnp.cosh(y)
            x = x + y
        return x

    picture = fp.draw(fp.trace(fun)(jnp.ones(3))).picture
    assert [n.label for n in picture.nodes if n.kind == "operator"] == ["sinh", "cosh", "+"]
    assert 5 in [box.count for box in picture.boxes]


def test_scopes_collapse_to_a_depth() -> None:
    graph = stack(4, 5)
    labels = [
        {n.label for n in fp.draw(graph, depth=d).picture.nodes if n.kind == "scope"} for d in (0, 1, 2)
    ]
    assert labels == [{"Stack"}, {"Block_0", "Block_1", "head"}, {"inner", "outer"}]
    whole = fp.draw(graph, depth=0).picture
    assert {(n.kind, n.name) for n in whole.nodes} == {
        ("variable", "x"),
        ("scope", "Stack"),
        ("variable", "Stack/head/add"),
    }
    assert "Block_0" in fp.draw(graph, depth=1).svg()
    (params,) = (n.details for n in whole.nodes if n.kind == "scope")
    weights = sum(v.nbytes or 0 for v in graph.inputs) - 24
    assert params == f"2 × 3 → 2 × 2\n{weights // 4} parameters, {weights} B"


def test_values_between_collapsed_scopes_share_an_arrow() -> None:
    def fun(x: Any) -> Any:
        with jax.named_scope("a"):
            y, z = jnp.sinh(x), jnp.cosh(x)
        with jax.named_scope("b"):
            return y * z

    picture = fp.draw(fp.trace(fun)(jnp.ones(3, "float32")), depth=0).picture
    keys = {n.label: n.key for n in picture.nodes}
    (edge,) = (e for e in picture.edges if (e.source, e.target) == (keys["a"], keys["b"]))
    assert (edge.nbytes, edge.variable) == (24, "a/sinh, a/cosh")


def test_unnamed_values_need_no_square() -> None:
    graph = fp.trace(lambda x: fp.name(jnp.sinh(jnp.cosh(x)), "y") * 2)(jnp.ones(3))
    names = [n.name for n in fp.draw(graph, unnamed=False).picture.nodes if n.kind == "variable"]
    assert names == ["x", "y", "mul"]
    assert len(fp.draw(graph).picture.nodes) == 7


def test_a_penalty_and_a_loss_are_in_no_module() -> None:
    """Weight decay reads parameters last: what is before it stands outside of the modules all the same."""

    def loss(layers: Any, x: Any) -> Any:
        for w, b in layers:
            x = jnp.tanh(x @ w + b)
        return jnp.sum(jnp.exp(x)) + sum(jnp.sum(w**2) for w, _ in layers)

    layers = [(jnp.ones((3, 3)), jnp.ones(3))] * 2
    picture = fp.draw(fp.trace(loss)(layers, jnp.ones(3))).picture
    boxes = {box.key: box.label for box in picture.boxes}
    inside = {node.label: boxes.get(node.box or "") for node in picture.nodes}
    assert inside["exp"] is inside["Σ"] is inside["x²"] is None
    assert sorted(boxes.values()) == ["layers", "layers/0", "layers/1"]
    assert "1" not in inside  # a number alone is no name of a parameter


def test_a_depth_that_is_no_number_is_refused():
    graph = fp.trace(jnp.sin)(1.0)
    for depth in ("all", -1):
        with pytest.raises(fp.DrawingError, match=r"fp.draw: depth=.* is no number of levels; pass 0"):
            fp.draw(graph, depth=depth)
