"""`fp.draw`: a graph as a picture, in memory or in a file."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from functools import cached_property
from html import escape
from pathlib import Path
from typing import get_args

from funcprop.drawing.backward import BackwardGraph
from funcprop.drawing.difference import Difference
from funcprop.drawing.distant_arrows import far_edges
from funcprop.drawing.dot import dot
from funcprop.drawing.figure import figure_of
from funcprop.drawing.geometry import size_of
from funcprop.drawing.layout import MANY, Direct, DrawingError, Engine, Layout, lay_out, require_known
from funcprop.drawing.levels import fitted, inside
from funcprop.drawing.loops import open_loops
from funcprop.drawing.markup import as_json, mermaid
from funcprop.drawing.merging import merged
from funcprop.drawing.nodes_and_boxes import FEW, Fold, assemble
from funcprop.drawing.opening_page import page
from funcprop.drawing.picture import Picture, node_ids
from funcprop.drawing.request import Shown
from funcprop.drawing.rows import ROW, in_rows
from funcprop.drawing.second_order import SecondOrderGraph
from funcprop.drawing.simplified import data_of, live, simplified
from funcprop.drawing.svg import Theme, svg
from funcprop.graph.graph import Graph
from funcprop.graph.module_scopes import with_module_scopes
from funcprop.graph.writable import require_writable

# What writes a file of each suffix: text or bytes.
SUFFIXES = {
    ".svg": "svg", ".html": "html", ".png": "png", ".pdf": "pdf",
    ".dot": "dot", ".gv": "dot", ".mmd": "mermaid", ".json": "json",
}  # fmt: skip


@dataclass(frozen=True)
class Drawing:
    """A drawn graph: `.svg()`, `.dot()`, `.mermaid()`, `.json()`; in a notebook it is the picture itself.

    Only `.svg()` needs a layout engine. `picture` is what is drawn, as plain data.
    """

    picture: Picture = field(repr=False)
    types: bool = field(repr=False)
    engine: Engine | None = None
    timeout: float = 60.0
    shown: Shown | None = field(default=None, repr=False)
    wrap: bool = True
    theme: Theme = "auto"
    fold: Fold = field(default=True, repr=False)
    loops: int | None = field(default=None, repr=False)

    @cached_property
    def inside(self) -> dict[str, Drawing]:
        """What is inside of the modules that are drawn as one node each, by the keys of these nodes."""
        if self.shown is None:
            return {}
        found = {}
        for node in self.picture.nodes:
            if node.inside:
                shown = _with_loops(inside(node, self.shown), self.loops)
                opened = fitted(shown, self.fold, None)
                types = len(shown.graph) <= _FEW_WITH_TYPES
                found[node.key] = replace(self, picture=opened.picture, types=types, shown=opened.shown)
        return found

    @cached_property
    def layout(self) -> Layout:
        """Where everything stands."""
        return self.in_rows_of(ROW) if self.wrap else self._in_one_row

    def in_rows_of(self, width: float) -> Layout:
        """Where everything stands in rows that are about so wide, in points."""
        ids = node_ids(self.picture)
        sizes = {ids[n.key]: size_of(n, self.types) for n in self.picture.nodes}
        return in_rows(self._in_one_row, sizes, width)

    @cached_property
    def _in_one_row(self) -> Layout:
        picture = self.picture
        far = far_edges(picture) if len(picture.nodes) > MANY else frozenset()
        ids, size = node_ids(picture), {n.key: size_of(n, self.types) for n in picture.nodes}
        direct = {
            i: Direct(ids[e.source], size[e.source], ids[e.target], size[e.target], e.kind == "residual")
            for i, e in enumerate(picture.edges)
            if i in far
        }
        source = dot(picture, self.types, far)
        found = lay_out(source, len(ids), len(picture.edges), self.engine, self.timeout, direct)
        ends = [found.nodes[ids[key]][1] for key in (picture.origin, picture.goal) if key is not None]
        if len(ends) == 2 and ends[1] > ends[0]:
            # The objective is above the input.
            found = found.mirrored()
        return found

    def svg(self) -> str:
        """The picture as SVG, self-contained and escaped; hovering shows types, bytes and sources.

        Raises:
            DrawingError: there is no layout engine, or it failed or took too long.
        """
        return svg(self.picture, self.layout, self.types, self.theme)

    def png(self) -> bytes:
        """The picture as PNG, two pixels a point, on white paper.

        Raises:
            DrawingError: there is no layout engine, or no matplotlib.
        """
        return figure_of(self.picture, self.layout, self.types, "png")

    def pdf(self) -> bytes:
        """The picture as PDF, as large as it is drawn, its fonts embedded.

        Raises:
            DrawingError: there is no layout engine, or no matplotlib.
        """
        return figure_of(self.picture, self.layout, self.types, "pdf")

    def html(self) -> str:
        """A page with the picture, on which a module opens where it is clicked; it loads nothing."""
        return page(self)

    def dot(self) -> str:
        """The picture in Graphviz's language."""
        return dot(self.picture, self.types)

    def mermaid(self) -> str:
        """The picture as a Mermaid flowchart."""
        return mermaid(self.picture, self.types)

    def json(self) -> str:
        """Nodes, edges and boxes as one JSON object."""
        return as_json(self.picture)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file; its suffix, one of .svg .html .png .pdf .dot .gv .mmd .json, says what.

        Raises:
            DrawingError: the suffix is another, or the directory is not there.
        """
        written = getattr(self, written_by(path))()
        Path(path).write_bytes(written if isinstance(written, bytes) else written.encode())

    def _repr_svg_(self) -> str:
        return self.svg()

    def _repr_html_(self) -> str:
        if not self.inside:
            return f'<div style="overflow:auto;max-height:80vh">{self.svg()}</div>'
        height = min(self.layout.height + 80, 700)
        frame = f'style="width:100%;height:{height:.0f}px;border:0" sandbox="allow-scripts"'
        return (
            f'<iframe {frame} title="{escape(self.picture.title)}" srcdoc="{escape(self.html())}"></iframe>'
        )


# Of a graph of the chapter's size, dtype and bytes are written into the picture.
_FEW_WITH_TYPES = 12

# Graphs of derivatives are drawn with open loops up to so many operators.
_FEW_IN_SWEEPS = 100

# A notebook shows at most so many nodes of a graph that nobody asked to be drawn.
_GLANCE = 300


def notebook_svg(graph: Graph | Difference) -> str | None:
    """Draw a graph for a notebook, with scopes collapsed until it can be taken in.

    None, for which a notebook shows the table, if there is no layout engine, or too much even then.
    """
    depths = (None, 3, 2, 1, 0) if type(graph) is not Graph else (None,)
    for depth in depths:
        drawing = draw(graph, depth=depth, timeout=10.0)
        if len(drawing.picture.nodes) <= _GLANCE:
            try:
                return drawing.svg()
            except DrawingError:
                return None
    return None


def written_by(path: str | os.PathLike[str]) -> str:
    """The method of `Drawing` that writes a file with this suffix.

    Raises:
        DrawingError: there is none, or the file cannot be written.
    """
    if not isinstance(path, str | os.PathLike):
        raise DrawingError(f"fp.draw: path={path!r} is no file; pass its name, such as 'net.svg'.")
    try:
        require_writable("fp.draw: path", path, tuple(SUFFIXES))
    except OSError as error:
        moving = Path(path).suffix in (".gif", ".mp4")
        hint = " For a picture that moves: fp.animate(fun)(*args).save('x.gif')." if moving else ""
        raise DrawingError(f"{error}{hint}") from None
    return SUFFIXES[Path(path).suffix]


def draw(
    graph: Graph | Difference,
    path: str | os.PathLike[str] | None = None,
    *,
    depth: int | None = None,
    loops: int | None = None,
    fold: Fold = True,
    dead: bool = False,
    unnamed: bool | None = None,
    types: bool | None = None,
    wrap: bool = True,
    theme: Theme = "auto",
    engine: Engine | None = None,
    timeout: float = 60.0,
) -> Drawing:
    """Draw a graph as the chapter does: squares are variables, circles operators, arrows data flow.

    The input is at the lower left and the objective at the upper right. Scopes are boxes. Blocks that follow
    each other and are the same are drawn once, with their number. Every arrow carries shape, dtype and bytes
    of its value, and hovering shows them.

    Args:
        graph: what `fp.trace`, `fp.backward_graph`, `fp.second_order_graph` or `fp.diff` returns.
        path: a file to write, by its suffix `.svg`, `.html`, `.png`, `.pdf`, `.dot`, `.gv`, `.mmd` (Mermaid)
            or `.json`.
        depth: collapse the scopes that have this many around them: 0 for all. By default all are open, but a
            function of more than 60 nodes is drawn as its modules, each with shapes, parameters and bytes,
            unless `loops`, `unnamed` or `fold=False` ask for more; `.inside` has a drawing of what is in each
            module, and `.save("x.html")` writes a page on which they open.
        loops: open `scan`, `while` and `cond` to this many levels: a box with the body, a dotted arrow in it
            leads back to what is carried. By default one level, if the picture then has up to 40 operators
            (100 in graphs of derivatives). In a difference, those that differ are open.
        fold: draw repeated blocks once, where the picture stays the same function; in graphs of more than 40
            operators also those that have no scope. `"sizes"` folds those that differ in their sizes as well,
            and says so; so does a picture that would have more than 60 nodes.
        dead: draw also what no result depends on, and arguments that nobody reads. This, `unnamed=True` and
            `fold=False` also draw what is left out of a function as no mathematics: changes of type, axes of
            length 1, values made from numbers alone, wrapped indices, `max(x, −∞)`, checkpoints.
        unnamed: draw a square also for a value that nobody named; by default in graphs of up to 40 operators.
            Without it, an arrow goes from operator to operator.
        types: write dtype and bytes into the squares, not only the shape; by default in graphs of up to 12
            operators.
        wrap: cut a picture that is much wider than high into rows.
        theme: `"auto"` follows the page, or the notebook, that the SVG is on; `"light"` is plain SVG for
            LaTeX, Inkscape and CairoSVG.
        engine: `"dot"` (Graphviz's own) or `"graphviz-pure"` (extra `draw`). By default `dot` if it is
            installed; from 801 nodes on `graphviz-pure` if it is, because `dot` would have to leave out the
            boxes to be done in seconds.
        timeout: seconds that the layout may take.

    Raises:
        TypeError: `graph` is none of these.
        DrawingError: another suffix, a directory that is not there, an unknown engine or theme; or (when a
            picture is asked for) no layout engine, or one that failed.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> drawing = fp.draw(fp.trace(jnp.tanh)(0.5))
        >>> [(node.kind, node.name) for node in drawing.picture.nodes]
        [('variable', 'x'), ('operator', 'tanh'), ('variable', 'tanh')]
    """
    if path is not None:
        written_by(path)
    if not (loops is None or isinstance(loops, int)) or (loops is not None and loops < 0):
        raise DrawingError(f"fp.draw: loops={loops!r} is no number of levels; pass 0 for all closed, 1, 2 …")
    require_known(engine)
    if theme not in get_args(Theme):
        raise DrawingError(f"fp.draw: theme={theme!r} is not known; choose 'auto' or 'light'.")
    if isinstance(graph, Difference):
        shown = merged(graph)
    elif isinstance(graph, BackwardGraph | SecondOrderGraph):
        shown = graph.shown()
    elif isinstance(graph, Graph):
        exact = dead or bool(unnamed) or not fold
        shown = Shown(graph if dead else live(graph if exact else simplified(graph)), data=data_of(graph))
    else:
        raise TypeError(
            f"fp.draw: graph={graph!r} is not a graph; pass what fp.trace(fun)(*args), fp.backward_graph, "
            "fp.second_order_graph or fp.diff returns."
        )
    if not isinstance(graph, Difference):
        shown = _with_loops(shown, loops)
    if types is None:
        types = len(shown.graph) <= _FEW_WITH_TYPES
    if depth is not None and (not isinstance(depth, int) or depth < 0):
        raise DrawingError(f"fp.draw: depth={depth!r} is no number of levels; pass 0 for all closed, 1, 2 …")
    is_asked_for = bool(loops) or unnamed or not fold or depth is not None
    is_function = isinstance(graph, Graph) and not shown.roles
    if is_function and not shown.links:
        shown = replace(shown, graph=with_module_scopes(shown.graph))
    if is_function and not is_asked_for:
        picture, shown = fitted(shown, fold, unnamed)
    else:
        picture = assemble(shown, depth, fold, unnamed)
    drawing = Drawing(picture, types, engine, timeout, shown, wrap, theme, fold, loops)
    if path is not None:
        drawing.save(path)
    return drawing


def _with_loops(shown: Shown, levels: int | None) -> Shown:
    opened = open_loops(shown, 1 if levels is None else levels)
    few = FEW if not shown.roles else _FEW_IN_SWEEPS
    return opened if levels is not None or len(opened.graph) <= few else shown
