"""Layout engines: which is taken, what goes wrong, and large pictures."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from pictures import ENGINES, SVG, Stack, chapter, elements, nasty, stack

import funcprop as fp
from funcprop.cli.target import chapter_example
from funcprop.drawing import distant_arrows as distant
from funcprop.drawing import layout
from funcprop.drawing.picture import node_ids


def test_an_unknown_engine_is_named() -> None:
    with pytest.raises(fp.DrawingError, match="engine='neato' is not known"):
        fp.draw(chapter(), engine="neato")  # type: ignore[arg-type]


def test_without_an_engine_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout.shutil, "which", lambda *_, **__: None)
    drawing = fp.draw(chapter())
    with pytest.raises(fp.DrawingError, match=r"pip install 'funcprop\[draw\]'"):
        drawing.svg()
    assert drawing.mermaid()


def fake_engine(directory: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    program = directory / "dot"
    program.write_text(f"#!{sys.executable}\n{code}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(directory))


def test_an_engine_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_engine(tmp_path, monkeypatch, "import sys; sys.exit('no memory left')")
    with pytest.raises(fp.DrawingError, match="failed with exit code 1: no memory left"):
        fp.draw(chapter(), engine="dot").svg()


def test_where_an_engine_fails_at_boxes_there_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As graphviz-pure does at the Hessian-vector product of a Flax transformer."""
    program = layout.find_engine("graphviz-pure")[1]
    code = f"""
import subprocess, sys
if "-Gclusterrank=none" not in sys.argv:
    sys.exit("the ranking of a cluster failed")
sys.exit(subprocess.run([{program!r}, *sys.argv[1:]]).returncode)"""
    graph = stack(4, 4)
    boxes = fp.draw(graph, fold=False, engine="graphviz-pure").layout.boxes
    fake_engine(tmp_path, monkeypatch, code)
    drawing = fp.draw(graph, fold=False, engine="dot")
    assert len(elements(drawing.svg(), "operator")) == len(graph.operators)
    assert boxes
    assert not drawing.layout.boxes


def test_an_engine_that_hangs_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_engine(tmp_path, monkeypatch, "import time; time.sleep(60)")
    with pytest.raises(fp.DrawingError, match=r"longer than 0\.2 seconds; collapse scopes"):
        fp.draw(chapter(), engine="dot", timeout=0.2).svg()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_thousand_operators_are_drawn_unfolded(engine: Any) -> None:
    drawing = fp.draw(stack(*[4] * 150), fold=False, engine=engine, timeout=60)
    circles = elements(drawing.svg(), "operator")
    assert len(circles) == len(stack(*[4] * 150).operators) > 1000


@pytest.mark.parametrize("engine", ENGINES)
def test_the_dot_text_is_graphviz(engine: str) -> None:
    program = layout.find_engine(engine)[1]  # type: ignore[arg-type]
    text = fp.draw(nasty()).dot()
    done = subprocess.run([program, "-Tplain"], input=text.encode(), capture_output=True, check=True)
    assert done.stdout.decode().count("\nnode ") == 3


@cache
def gradient(blocks: int) -> fp.Graph:
    model, x = Stack((4,) * blocks), jax.ShapeDtypeStruct((2, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    return fp.backward_graph(lambda params, x: jnp.sum(model.apply(params, x)))(params, x)


def seconds_of_cpu() -> float:
    """Of this process and of the engines that it has run: other processes do not slow these down."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


@pytest.mark.nightly
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["function", "gradient"])
def test_three_thousand_operators_are_drawn_unfolded_in_ten_seconds(kind: str, engine: Any) -> None:
    graph = stack(*[4] * 430) if kind == "function" else gradient(140)
    start = seconds_of_cpu()
    drawing = fp.draw(graph, fold=False, engine=engine)
    circles = elements(drawing.svg(), "operator")
    # It takes 1.5 to 3.5 seconds.
    assert seconds_of_cpu() - start < 10
    assert len(circles) == len(graph.operators) > 3000
    # What an engine takes long for is a bend in every column that an arrow crosses.
    picture = drawing.picture
    column, far = distant.columns(picture), distant.far_edges(picture)
    near = [e for i, e in enumerate(picture.edges) if i not in far]
    assert sum(abs(column[e.target] - column[e.source]) for e in near) < 2 * len(picture.nodes)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("blocks", [2, 40])
def test_every_arrow_is_inside_the_picture(engine: Any, blocks: int) -> None:
    """Both sweeps, in which arrows go around everything; of many nodes, far arrows are drawn by ourselves."""
    drawing = fp.draw(gradient(blocks), fold=False, engine=engine)
    assert (len(drawing.picture.nodes) > layout.MANY) == (blocks == 40)
    root = ElementTree.fromstring(drawing.svg())
    width, height = float(root.get("width")), float(root.get("height"))
    numbers = re.compile(r"-?\d+\.\d+")
    paths = [path.get("d") for path in root.iter(f"{SVG}path")]
    assert len(paths) == len(drawing.picture.edges)
    for path in paths:
        points = list(map(float, numbers.findall(path)))
        curves = zip(points[0::2], points[1::2], strict=True)
        ends = [point for i, point in enumerate(curves) if i % 3 == 0]
        # The group of all of it is moved by the margin of 12.
        assert all(-12 <= x <= width - 12 and -12 <= y <= height - 12 for x, y in ends)


@pytest.mark.parametrize("engine", ENGINES)
def test_no_arrow_shoots_out_of_both_sweeps(engine: Any) -> None:
    """Both engines bend one residual of the chapter's gradient 400 points away from all nodes, and back."""
    drawing = fp.draw(fp.backward_graph(fp.models.chapter)(*chapter_example()), engine=engine)
    found = drawing.layout
    for route in found.edges:
        assert all(-1e-6 < x < found.width + 1e-6 for x, _ in route.points)
        assert all(-1e-6 < y < found.height + 1e-6 for _, y in route.points)
    joints = [y for route in found.edges for _, y in route.points[::3]]
    nodes = [y for _, y in found.nodes.values()]
    assert min(*joints, *nodes) < 30
    assert max(*joints, *nodes) > found.height - 30


def test_far_arrows_begin_and_end_at_their_nodes() -> None:
    drawing = fp.draw(gradient(40), fold=False, engine="graphviz-pure")
    ids = node_ids(drawing.picture)
    far = distant.far_edges(drawing.picture)
    assert any(drawing.picture.edges[i].kind == "residual" for i in far)
    for i in far:
        edge, route = drawing.picture.edges[i], drawing.layout.edges[i]
        start, end = (drawing.layout.nodes[ids[key]] for key in (edge.source, edge.target))
        assert (route.points[0][1], route.tip[1]) == pytest.approx((start[1], end[1]))
        assert max(abs(route.points[0][0] - start[0]), abs(route.tip[0] - end[0])) < 150
