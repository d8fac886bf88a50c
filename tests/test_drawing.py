"""Pictures: the chapter's figure, boxes, folding, escaping, files, and both layout engines."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import funcprop as fp
from funcprop.cli.target import chapter_example
from funcprop.drawing import distant, layout, palette
from funcprop.drawing.picture import node_ids

ENGINES = [
    pytest.param(
        "dot",
        marks=pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz's dot is not installed"),
    ),
    "graphviz-pure",
]
SVG = "{http://www.w3.org/2000/svg}"


def chapter() -> fp.Graph:
    return fp.trace(fp.models.chapter)(*chapter_example())


def elements(svg: str, kind: str) -> dict[str, Any]:
    """The groups of one kind by the name of what they draw."""
    root = ElementTree.fromstring(svg)
    return {g.get("data-name"): g for g in root.iter(f"{SVG}g") if g.get("class") == f"funcprop-{kind}"}


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


class Block(nn.Module):
    width: int = 4

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return x + nn.Dense(x.shape[-1], name="outer")(nn.tanh(nn.Dense(self.width, name="inner")(x)))


class Stack(nn.Module):
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for width in self.widths:
            x = Block(width)(x)
        return nn.Dense(2, name="head")(x)


@cache
def stack(*widths: int) -> fp.Graph:
    model, x = Stack(widths), jax.ShapeDtypeStruct((2, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    return fp.trace(lambda params, x: model.apply(params, x))(params, x)


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
    assert sorted(operators) == sorted(op.name for op in graph.operators)
    produced = {v.name: v for v in graph.variables}
    for node in nodes:
        if node.kind == "variable":
            assert node.members[0] == node.name
            assert {produced[name].type for name in node.members} == {produced[node.name].type}


def test_only_equal_blocks_that_follow_each_other_are_folded() -> None:
    counts = box_labels(fp.draw(stack(4, 4, 5, 5, 5, 4)).picture)
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
    assert params.endswith(f"{weights} B of parameters")


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


# --- what is written --------------------------------------------------------------------------

NASTY = "<b>&\"'</script>\\N{x}\u2028"
HOSTILE = [
    NASTY,
    "two\nlines\r\tand `code`",
    "ünïcödé 漢字 🐍 \u202e",
    "x" * 300,
    "]] --> end; n0[(",
    "&amp; %% #35;",
]


def hostile(label: str) -> fp.Graph:
    """A name as that of an input, of a scope and of a value."""

    def fun(p: Any) -> Any:
        with jax.named_scope(label.replace("/", "")):
            y = jnp.sinh(p[label])
        return fp.name(jnp.cosh(y), label + "2")

    return fp.trace(fun)({label: jnp.ones(2)})


def nasty() -> fp.Graph:
    return fp.trace(lambda p: fp.name(jnp.sinh(p[NASTY]), NASTY + "2"))({NASTY: jnp.ones(2)})


def printable(label: str) -> str:
    return "".join(c if c.isprintable() else "�" for c in label)


def as_dot_reads(label: str) -> str:
    """Escapes of quotes are read, those of backslashes and line ends are left for the label."""
    lines = label.replace("\\", "\\\\").split("\n")
    return "\\n".join(map(printable, lines))


MERMAID = re.compile(
    r'flowchart LR|end|  *n\d+(\[|\(\(|\()"[^"\n]*"(\]|\)\)|\))|  *subgraph b\d+\["[^"\n]*"\]'
    r'|  n\d+ (-->|==>|-\.->)(\|"[^"\n]*"\|)? n\d+|  classDef role\d+ [\w:#,]+|  class [n\d,]+ role\d+'
)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("label", HOSTILE)
def test_every_format_survives_every_name(label: str, engine: Any) -> None:
    drawing = fp.draw(hostile(label), engine=engine, types=True)
    both = {label, label + "2"}
    found = json.loads(drawing.json())
    assert {n["name"] for n in found["nodes"] if n["kind"] == "variable"} >= both
    assert set(elements(drawing.svg(), "variable")) >= set(map(printable, both))
    program = layout.find_engine(engine)[1]
    done = subprocess.run([program, "-Tjson0"], input=drawing.dot().encode(), capture_output=True, check=True)
    variables = {html.unescape(edge["variable"]) for edge in json.loads(done.stdout)["edges"]}
    assert {as_dot_reads(label), as_dot_reads(label + "2")} <= variables
    for line in drawing.mermaid().splitlines():
        assert MERMAID.fullmatch(line) or line.strip() == "end", line
    for text in (drawing.svg(), drawing.mermaid(), drawing.json()):
        assert "</script>" not in text


@pytest.mark.parametrize("engine", ENGINES)
def test_names_are_escaped(engine: Any) -> None:
    drawing = fp.draw(nasty(), engine=engine, types=True)
    names = set(elements(drawing.svg(), "variable"))
    assert names == {printable(NASTY), printable(NASTY) + "2"}
    assert "<b>" not in drawing.svg()
    assert '"<b>' not in drawing.mermaid()


@pytest.mark.parametrize("suffix", [".svg", ".dot", ".gv", ".mmd", ".json"])
def test_a_file_is_written_by_its_suffix(tmp_path: Path, suffix: str) -> None:
    drawing = fp.draw(chapter(), tmp_path / f"graph{suffix}")
    text = (tmp_path / f"graph{suffix}").read_text("utf-8")
    start = {".svg": "<svg ", ".mmd": "flowchart", ".json": "{"}.get(suffix, "digraph")
    assert text.startswith(start)
    assert text in (drawing.svg(), drawing.dot(), drawing.mermaid(), drawing.json())


def test_another_suffix_is_an_error_before_anything_is_done(tmp_path: Path) -> None:
    with pytest.raises(fp.DrawingError, match=r"ends in '\.png'; write one of \.svg, \.dot"):
        fp.draw(chapter(), tmp_path / "graph.png")
    with pytest.raises(TypeError, match="is not a graph"):
        fp.draw(fp.models.chapter)  # type: ignore[arg-type]


def test_a_drawing_shows_itself_in_a_notebook() -> None:
    drawing = fp.draw(chapter())
    assert drawing._repr_svg_() == drawing.svg()
    assert drawing.svg() in drawing._repr_html_()
    # Several on one page must not share ids.
    assert not re.search(r"\sid=", drawing.svg())


@pytest.mark.parametrize("sweeps", [fp.trace, fp.backward_graph, fp.second_order_graph])
def test_graphs_show_themselves_in_a_notebook(sweeps: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = sweeps(fp.models.chapter)(*chapter_example())
    assert graph._repr_svg_() == fp.draw(graph).svg()
    difference = fp.diff(graph, chapter())
    assert difference._repr_svg_() == fp.draw(difference).svg()
    # A notebook shows the table where nothing can be laid out.
    monkeypatch.setattr(layout.shutil, "which", lambda *_, **__: None)
    assert graph._repr_svg_() is None


def test_a_notebook_shows_large_graphs_collapsed() -> None:
    widths = tuple(range(4, 64))  # All blocks differ, so that nothing is folded.
    graph = stack(*widths)
    assert len(fp.draw(graph).picture.nodes) > 300
    assert len(fp.draw(graph, depth=1).picture.nodes) < len(fp.draw(graph, depth=2).picture.nodes) <= 300
    assert graph._repr_svg_() == fp.draw(graph, depth=2).svg()
    flat = fp.trace(lambda x: [jnp.sinh(x + i) for i in range(200)])(1.0)
    assert flat._repr_svg_() is None


def test_small_graphs_show_their_types() -> None:
    assert "float64[3,4], 96 B" in {n.details for n in fp.draw(chapter()).picture.nodes}
    assert ">float64[3,4], 96 B</text>" in fp.draw(chapter()).svg()
    assert ">float64[3,4], 96 B</text>" not in fp.draw(chapter(), types=False).svg()
    assert not fp.draw(stack(4, 5)).types


@pytest.mark.parametrize("engine", ENGINES)
def test_edges_carry_shape_dtype_and_bytes_in_every_format(engine: str) -> None:
    drawing = fp.draw(chapter(), types=False)
    program = layout.find_engine(engine)[1]  # type: ignore[arg-type]
    done = subprocess.run([program, "-Tjson0"], input=drawing.dot().encode(), capture_output=True, check=True)
    of_dot = json.loads(done.stdout)["edges"]
    of_json = json.loads(drawing.json())["edges"]
    titles = [
        g.find(f"{SVG}title").text
        for g in ElementTree.fromstring(drawing.svg()).iter(f"{SVG}g")
        if g.get("class", "").startswith("funcprop-edge")
    ]
    assert len(of_dot) == len(of_json) == len(titles) == 18
    for i, edge in enumerate(of_json):
        (found,) = (e for e in of_dot if e["id"] == f"e{i}")
        assert json.loads(found["dimensions"]) == edge["shape"]
        assert (found["dtype"], found["nbytes"]) == (edge["dtype"], str(edge["nbytes"]))
        assert titles[i] == found["tooltip"]
        assert f"{edge['dtype']}[{','.join(map(str, edge['shape']))}], {edge['nbytes']} B" in titles[i]


def test_mermaid_has_squares_circles_and_boxes() -> None:
    text = fp.draw(stack(4, 4)).mermaid()
    assert re.search(r'n\d+\(\("×"\)\)', text)
    assert 'subgraph b1["Block_0 … Block_1 × 2"]' in text
    assert text.count("subgraph") == text.count("end\n")


def contrast(a: str, b: str) -> float:
    """The contrast ratio of two colours, by the definition of the WCAG."""

    def luminance(colour: str) -> float:
        parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_are_legible(theme: str) -> None:
    def shown(colour: str) -> str:
        return palette.DARK[colour] if theme == "dark" else colour

    for kind in ("variable", "operator", "scope"):
        for role in ("", *palette.ROLES):
            fill, stroke, text = map(shown, palette.paint(kind, role))
            assert contrast(text, fill) >= 11
            assert contrast(shown(palette.FAINT), fill) >= 6
            assert contrast(stroke, shown(palette.PAPER)) >= 4.5
    assert (contrast(shown(palette.PAPER), "#ffffff") > 15) == (theme == "dark")


def test_every_colour_has_a_rule_for_dark_pages() -> None:
    graphs: list[Any] = [chapter(), fp.backward_graph(fp.models.chapter)(*chapter_example())]
    graphs += [fp.second_order_graph(fp.models.chapter)(*chapter_example()), fp.diff(graphs[0], stack(4))]
    for graph in graphs:
        root = ElementTree.fromstring(fp.draw(graph, depth=0).svg())
        (style,) = (e.text or "" for e in root.iter(f"{SVG}style"))
        for element in root.iter():
            for attribute in ("fill", "stroke"):
                colour = element.get(attribute)
                if colour not in (None, "none"):
                    both = f"light-dark({colour},{palette.DARK[colour]})"
                    assert f'[{attribute}="{colour}"]){{{attribute}:{both}}}' in style
        # Every rule is for this picture alone, and yields to those of the page.
        selectors = re.findall(r"^(.*?)\{", style, flags=re.MULTILINE)
        assert len(selectors) == len(style.splitlines())
        assert all(s.startswith(":where(") and "svg.funcprop-graph" in s for s in selectors)


# --- engines ----------------------------------------------------------------------------------


def test_an_unknown_engine_is_named() -> None:
    with pytest.raises(fp.DrawingError, match="engine='neato' is not known"):
        fp.draw(chapter(), engine="neato").svg()  # type: ignore[arg-type]


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
