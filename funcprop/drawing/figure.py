"""The picture as PNG and PDF, drawn by matplotlib: it comes as a wheel and brings fonts with all symbols."""

from __future__ import annotations

import io
from typing import Any

from funcprop.drawing.dot import box_label
from funcprop.drawing.geometry import DETAIL, EDGE_LABEL, LABEL, details_of, label_of, size_of
from funcprop.drawing.layout import DrawingError, Layout, Point, Route
from funcprop.drawing.palette import BOX, BOX_LINE, FAINT, INK, MEANINGS, PAPER, ROLES, ink, paint
from funcprop.drawing.picture import Edge, Node, Picture, node_ids

_MARGIN, _LEGEND_LINE = 12.0, 22.0
# matplotlib's own face is wider than those for which the nodes are measured.
_NARROWER = 0.88
_DASHES: dict[str, Any] = {"repeat": (0, (2, 3)), "residual": (0, (5, 3))}


def figure_of(picture: Picture, layout: Layout, with_types: bool, written_as: str) -> bytes:
    """The picture as a file of this format, a point a point.

    Raises:
        DrawingError: matplotlib is not installed.
    """
    figure = PaintedFigure(picture, layout, with_types)
    file = io.BytesIO()
    figure.figure.savefig(file, format=written_as, dpi=144)
    return file.getvalue()


class PaintedFigure:
    """A matplotlib figure of a picture; `nodes` are the outlines, by key, `arrows` the lines of the edges."""

    def __init__(self, picture: Picture, layout: Layout, with_types: bool, below: float = 0.0) -> None:
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError:
            raise DrawingError(
                "fp.draw: PNG, PDF and GIF need matplotlib; pip install 'funcprop[draw]' brings it. "
                "`.svg()` and `.html()` need it not."
            ) from None
        legend = [] if below else list(picture.legend)
        self.width = max(layout.width, 200.0 if legend else 0.0) + 2 * _MARGIN
        self.height = layout.height + 2 * _MARGIN + _LEGEND_LINE * len(legend) + below
        self.figure = Figure(figsize=(self.width / 72, self.height / 72), facecolor=PAPER)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_xlim(-_MARGIN, self.width - _MARGIN)
        self.axes.set_ylim(self.height - _MARGIN, -_MARGIN)
        self.axes.axis("off")
        self.nodes: dict[str, Any] = {}
        self.arrows: list[tuple[Edge, list[Any]]] = []
        for box in picture.boxes:
            if box.key in layout.boxes:
                self.box(box_label(box), layout.boxes[box.key], layout.is_mirrored)
        for edge, route in zip(picture.edges, layout.edges, strict=True):
            self.arrow(edge, route)
        ids = node_ids(picture)
        for node in picture.nodes:
            self.node(node, layout.nodes[ids[node.key]], with_types)
        for i, role in enumerate(legend):
            self.key(role, layout.height + _MARGIN + (i + 0.5) * _LEGEND_LINE)

    def text(self, x: float, y: float, text: str, size: float, colour: str, **options: Any) -> Any:
        """Write, centred unless said otherwise; a dollar sign is no formula."""
        chosen: dict[str, Any] = {"ha": "center", "va": "center", "parse_math": False} | options
        return self.axes.text(x, y, text, fontsize=size * _NARROWER, color=colour, **chosen)

    def box(self, label: str, parts: Any, mirrored: bool) -> None:
        """Draw a scope, in every row through which it goes."""
        from matplotlib.patches import FancyBboxPatch

        for left, top, right, bottom in parts:
            style = FancyBboxPatch(
                (left, top), right - left, bottom - top, boxstyle="round,pad=0,rounding_size=8",
                facecolor=BOX, edgecolor=BOX_LINE, linewidth=1.0, zorder=0,
            )  # fmt: skip
            self.axes.add_patch(style)
        left, top, _, bottom = parts[0]
        self.text(left + 8, bottom - 9 if mirrored else top + 10, label, 11, FAINT, ha="left")

    def node(self, node: Node, centre: Point, with_types: bool) -> None:
        """Draw a square, a circle or a module, with what is written into it."""
        from matplotlib.patches import Ellipse, FancyBboxPatch

        size, (x, y) = size_of(node, with_types), centre
        fill, stroke, colour = paint(node.kind, node.role)
        line: Any = (0, (4, 3)) if node.role == "saved" else "solid"
        options = {"facecolor": fill, "edgecolor": stroke, "linewidth": 1.2, "linestyle": line, "zorder": 3}
        if node.kind == "operator":
            outline: Any = Ellipse(centre, size.width, size.height, **options)
        else:
            round_ = "round,pad=0,rounding_size=8" if node.kind == "scope" else "square,pad=0"
            corner = x - size.width / 2, y - size.height / 2
            outline = FancyBboxPatch(corner, size.width, size.height, boxstyle=round_, **options)
        self.nodes[node.key] = self.axes.add_patch(outline)
        details, label = details_of(node, with_types), label_of(node)
        top = y - (LABEL * 1.2 * bool(label) + DETAIL * 1.25 * len(details)) / 2
        if label:
            self.text(x, top + LABEL * 0.6, label, LABEL, colour, zorder=4)
        for i, detail in enumerate(details):
            at = top + LABEL * 1.2 * bool(label) + DETAIL * (1.25 * i + 0.6)
            self.text(x, at, detail, DETAIL, FAINT, zorder=4)

    def arrow(self, edge: Edge, route: Route) -> None:
        """Draw an arrow with its head and its label."""
        from matplotlib.patches import PathPatch, Polygon
        from matplotlib.path import Path

        codes = [Path.MOVETO] + [Path.CURVE4] * (len(route.points) - 1)
        dashes: Any = (0, (5, 3)) if edge.role == "removed" else _DASHES.get(edge.kind, "solid")
        colour, wide = ink(edge.kind, edge.role), 1.8 if edge.kind == "residual" else 1.1
        path = Path(list(route.points), codes)
        line = PathPatch(path, fill=False, edgecolor=colour, linewidth=wide, linestyle=dashes, zorder=1)
        drawn = [self.axes.add_patch(line)]
        if route.tip is not None:
            (x, y), (u, v) = route.points[-1], route.tip
            length = ((u - x) ** 2 + (v - y) ** 2) ** 0.5 or 1.0
            nx, ny = -(v - y) / length * 2.8, (u - x) / length * 2.8
            corners = [(u, v), (x + nx, y + ny), (x - nx, y - ny)]
            drawn.append(
                self.axes.add_patch(Polygon(corners, closed=True, color=colour, linewidth=0, zorder=2))
            )
        self.arrows.append((edge, drawn))
        if edge.label:
            paper = {"facecolor": PAPER, "edgecolor": "none", "pad": 0.5, "alpha": 0.85}
            self.text(*(route.label or route.middle), edge.label, EDGE_LABEL, FAINT, bbox=paper, zorder=5)

    def key(self, role: str, y: float) -> None:
        """Draw a line of the legend."""
        from matplotlib.patches import Ellipse

        colours = ROLES[role]
        self.axes.add_patch(Ellipse((9, y), 18, 14, facecolor=colours.fill, edgecolor=colours.stroke))
        self.text(26, y, MEANINGS.get(role, role), 12, INK, ha="left")
