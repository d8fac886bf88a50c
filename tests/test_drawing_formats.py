"""What is written of a picture: every format survives every name, files, notebooks, colours."""

from __future__ import annotations

import html
import json
import re
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chromium import launched
from drawn_models import MODELS
from pictures import ENGINES, NASTY, SVG, chapter, elements, nasty, printable, stack
from PIL import Image
from playwright.sync_api import Browser

import funcprop as fp
from funcprop.cli.target import chapter_example
from funcprop.drawing import layout, palette
from funcprop.drawing.geometry import size_of
from funcprop.drawing.picture import node_ids

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
    for name, said in {
        "graph.gif": r"For a picture that moves: fp\.animate",
        "graph.jpg": r"ends in '\.jpg'; write one of \.svg, .* Did you mean \.png\?",
        "graph": "has no suffix that says what to write; write one of",
        "nowhere/graph.svg": "there is no directory '.*nowhere'; make it first",
        "": "is a directory; name a file in it, as '.*picture.svg'",
    }.items():
        with pytest.raises(fp.DrawingError, match=said):
            fp.draw(chapter(), tmp_path / name)
    with pytest.raises(fp.DrawingError, match="theme='dark' is not known; choose 'auto' or 'light'"):
        fp.draw(chapter(), theme="dark")  # type: ignore[arg-type]
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
    widths = tuple(range(4, 24))  # All blocks differ, so that nothing is folded.
    graph = stack(*widths)
    assert len(fp.draw(graph, depth=9).picture.nodes) > 100
    drawing = fp.draw(graph)
    assert len(drawing.picture.nodes) <= 60
    assert graph._repr_svg_() == drawing.svg()
    flat = fp.trace(lambda x: [jnp.sinh(x + i) for i in range(400)])(1.0)
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


def test_the_light_theme_is_plain_svg() -> None:
    graph = fp.backward_graph(fp.models.chapter)(*chapter_example())
    plain = fp.draw(graph, theme="light").svg()
    assert not any(word in plain for word in ("light-dark", "<style", "paint-order", "color-scheme"))
    assert ElementTree.fromstring(plain) is not None
    symbols = [t for t in ElementTree.fromstring(plain).iter(f"{SVG}text") if "⊙" in "".join(t.itertext())]
    assert symbols
    assert all("DejaVu Sans" in t.get("font-family", "") for t in symbols)


def test_png_and_pdf(tmp_path: Path) -> None:
    drawing = fp.draw(fp.backward_graph(fp.models.chapter)(*chapter_example()))
    drawing.save(tmp_path / "graph.png")
    drawing.save(tmp_path / "graph.pdf")
    image = np.asarray(Image.open(tmp_path / "graph.png").convert("RGB")).astype(int)
    # Two pixels a point, with a margin of 12 points, and a legend of three lines.
    width, height = 2 * (drawing.layout.width + 24), 2 * (drawing.layout.height + 24 + 66)
    assert abs(image.shape[1] - width) <= 2
    assert abs(image.shape[0] - height) <= 2
    # Forward nodes are blue and backward ones orange, where the layout puts them.
    ids = node_ids(drawing.picture)
    for node in drawing.picture.nodes:
        if node.kind == "operator" and node.role in ("forward", "backward"):
            x, y = drawing.layout.nodes[ids[node.key]]
            red, _, blue = image[int(2 * (y + 12)) - 14, int(2 * (x + 12))]
            assert (blue > red) == (node.role == "forward")
    assert (tmp_path / "graph.pdf").read_bytes().startswith(b"%PDF")


def test_rows_keep_every_arrow_whole() -> None:
    """A wide picture is cut into rows: nothing overlaps, and every arrow goes from its node to its node."""
    graph = MODELS["haiku_mlp"]()
    wide, drawing = fp.draw(graph, depth=9, wrap=False).layout, fp.draw(graph, depth=9)
    layout, picture = drawing.layout, drawing.picture
    assert wide.width > 1.5 * layout.width
    ids, size = node_ids(picture), {n.key: size_of(n, False) for n in picture.nodes}
    places = [(layout.nodes[ids[n.key]], size[n.key]) for n in picture.nodes]
    for i, ((x, y), s) in enumerate(places):
        for (u, v), t in places[i + 1 :]:
            assert abs(x - u) >= (s.width + t.width) / 2 or abs(y - v) >= (s.height + t.height) / 2
    assert all(0 <= x <= layout.width and 0 <= y <= layout.height for x, y in layout.nodes.values())
    for edge, route in zip(picture.edges, layout.edges, strict=True):
        for key, (x, y) in ((edge.source, route.points[0]), (edge.target, route.tip or route.points[-1])):
            (u, v), s = layout.nodes[ids[key]], size[key]
            assert abs(x - u) <= s.width / 2 + 8
            assert abs(y - v) <= s.height / 2 + 8
        assert len(route.points) % 3 == 1


def test_modules_open_where_they_are_clicked(browser: Browser, tmp_path: Path) -> None:
    drawing = fp.draw(MODELS["transformer"]())
    drawing.save(tmp_path / "page.html")
    complaints: list[str] = []
    page = browser.new_page()
    page.on("console", lambda message: complaints.append(message.text))
    page.goto((tmp_path / "page.html").as_uri())
    assert page.locator("section:visible").count() == 1
    page.locator("section:visible .opens", has_text="block0 … block1 × 2").click()
    assert "› block0 … block1 × 2" in page.locator("section:visible nav").inner_text()
    assert "query" in page.locator("section:visible svg").inner_html()
    page.locator("section:visible .opens", has_text="query").click()
    assert page.locator("section:visible .funcprop-scope").count() == 0
    page.keyboard.press("Escape")
    page.locator("section:visible nav a").first.click()
    assert "block0 … block1" in page.locator("section:visible svg").inner_html()
    assert not complaints
    assert "<iframe" in drawing._repr_html_()


browser = pytest.fixture(scope="module")(launched)
