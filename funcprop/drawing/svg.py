"""The picture as SVG: self-contained, without ids or styles that could meet those of the page it is on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal
from xml.sax.saxutils import escape, quoteattr

from funcprop.drawing.dot import box_label
from funcprop.drawing.geometry import DETAIL, EDGE_LABEL, LABEL, details_of, label_of, size_of, text_width
from funcprop.drawing.layout import Layout, Point, Route
from funcprop.drawing.palette import BOX, BOX_LINE, FAINT, INK, MEANINGS, PAPER, ROLES, ink, paint, stylesheet
from funcprop.drawing.picture import Box, Edge, Node, Picture, node_ids

_CLASS = "funcprop-graph"
_MARGIN = 12.0
_LEGEND_LINE = 22.0
# "auto" follows the page, or the notebook, in CSS of browsers; "light" is plain SVG, which everything reads.
Theme = Literal["auto", "light"]
# Faces that have the mathematical symbols; not every program looks for them by itself.
_SYMBOLS = "'DejaVu Sans', 'Segoe UI Symbol', 'Cambria Math', 'Apple Symbols', 'Noto Sans Math', sans-serif"
_FONT = "Helvetica, Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif"


def svg(picture: Picture, layout: Layout, with_types: bool, theme: Theme = "auto") -> str:
    """The picture at the places that the layout gives."""
    ids = node_ids(picture)
    legend = list(_legend(picture))
    width = layout.width + 2 * _MARGIN
    if legend:
        width = max(width, 2 * _MARGIN + max(text_width(MEANINGS.get(r, r), 12) for r in picture.legend) + 30)
    height = layout.height + 2 * _MARGIN + _LEGEND_LINE * len(legend)
    body = [
        *_background(width, height),
        f'<g transform="translate({_MARGIN:g} {_MARGIN:g})">',
        *(_box(box, layout) for box in picture.boxes if box.key in layout.boxes),
        *(_edge(edge, route) for edge, route in zip(picture.edges, layout.edges, strict=True)),
        *(_node(node, layout.nodes[ids[node.key]], with_types) for node in picture.nodes),
        *(_edge_label(edge, route) for edge, route in zip(picture.edges, layout.edges, strict=True)),
        "</g>",
        *(_moved(line, layout.height + 2 * _MARGIN + i * _LEGEND_LINE) for i, line in enumerate(legend)),
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
            f'viewBox="0 0 {width:.2f} {height:.2f}" role="img" font-family={quoteattr(_FONT)} '
            f'text-anchor="middle" class="{_CLASS}">',
            f"<title>{clean(picture.title)}</title>",
            f"<desc>{clean(_description(picture))}</desc>",
            *([] if theme == "light" else [f"<style>{clean(stylesheet(_CLASS))}</style>"]),
            *body,
            "</svg>",
        ]
    )


def _moved(element: str, y: float) -> str:
    return f'<g transform="translate({_MARGIN:g} {y:g})">{element}</g>'


def clean(text: str) -> str:
    """Text for XML: escaped, and without the characters that XML does not have."""
    return escape("".join(c if c.isprintable() or c in "\n\t" else "�" for c in text))


def _attribute(text: str) -> str:
    return quoteattr("".join(c if c.isprintable() else "�" for c in text))


def _description(picture: Picture) -> str:
    kinds = [node.kind for node in picture.nodes]
    return (
        f"Computational graph of {picture.title}: {kinds.count('variable')} variables (squares), "
        f"{kinds.count('operator')} operators (circles), {kinds.count('scope')} collapsed scopes, "
        f"{len(picture.edges)} arrows."
    )


def _background(width: float, height: float) -> Iterator[str]:
    yield f'<rect width="{width:.2f}" height="{height:.2f}" rx="6" fill="{PAPER}"/>'


def _box(box: Box, layout: Layout) -> str:
    parts = layout.boxes[box.key]
    left, top, _, bottom = parts[0]
    # The engine keeps room for the name at the top, which a mirrored layout has at the bottom.
    baseline = bottom - 6 if layout.is_mirrored else top + 13
    label = box_label(box)
    return (
        f'<g class="funcprop-box" data-key={_attribute(box.key)}><title>{clean(box.tooltip)}</title>'
        + "".join(
            f'<rect x="{x:.2f}" y="{y:.2f}" width="{u - x:.2f}" height="{v - y:.2f}" rx="8" '
            f'fill="{BOX}" fill-opacity="0.7" stroke="{BOX_LINE}"/>'
            for x, y, u, v in parts
        )
        + f'<text x="{left + 8:.2f}" y="{baseline:.2f}" font-size="11" text-anchor="start" fill="{FAINT}">'
        f"{clean(label)}</text></g>"
    )


def _node(node: Node, centre: Point, with_types: bool) -> str:
    size = size_of(node, with_types)
    fill, stroke, text = paint(node.kind, node.role)
    x, y = centre
    w, h = size.width, size.height
    colours = f'fill="{fill}" stroke="{stroke}" stroke-width="1.2"'
    if node.role == "saved":
        colours += ' stroke-dasharray="4 3"'
    if node.kind == "operator":
        outline = f'<ellipse cx="{x:.2f}" cy="{y:.2f}" rx="{w / 2:.2f}" ry="{h / 2:.2f}" {colours}/>'
    else:
        corner = 8 if node.kind == "scope" else 0
        outline = (
            f'<rect x="{x - w / 2:.2f}" y="{y - h / 2:.2f}" width="{w:.2f}" height="{h:.2f}" '
            f'rx="{corner}" {colours}/>'
        )
    details = details_of(node, with_types)
    label = label_of(node)
    lines = []
    top = y - (LABEL * 1.2 * bool(label) + DETAIL * 1.25 * len(details)) / 2
    if label:
        written = _with_subscript(label) if node.kind == "operator" else clean(label)
        lines.append(
            f'<text x="{x:.2f}" y="{top + LABEL * 0.95:.2f}" font-size="{LABEL:g}" fill="{text}"'
            f"{_face(label)}>{written}</text>"
        )
    for i, line in enumerate(details):
        below = top + LABEL * 1.2 * bool(label) + DETAIL * (1.25 * i + 0.95)
        lines.append(
            f'<text x="{x:.2f}" y="{below:.2f}" font-size="{DETAIL:g}" fill="{FAINT}"'
            f"{_face(line)}>{clean(line)}</text>"
        )
    return (
        f'<g class="funcprop-{node.kind}" data-key={_attribute(node.key)} data-name={_attribute(node.name)} '
        f"data-role={_attribute(node.role)}><title>{clean(node.tooltip)}</title>{outline}{''.join(lines)}</g>"
    )


def _face(text: str) -> str:
    """The attribute that gives a text a face with its symbols, if it has any beyond Latin and Greek."""
    return (
        f" font-family={quoteattr(_SYMBOLS)}" if any(c > "\u03ff" and c not in "…–—−" for c in text) else ""
    )


def _with_subscript(label: str) -> str:
    """`‖·‖²_F` with the F below the line: one letter after the underscore of a symbol, not of a name."""
    stem, separator, letter = label.rpartition("_")
    if separator and len(letter) == 1 and not any(map(str.isalpha, stem)):
        return f'{clean(stem)}<tspan dy="3" font-size="{DETAIL:g}">{clean(letter)}</tspan>'
    return clean(label)


def _edge(edge: Edge, route: Route) -> str:
    colour = ink(edge.kind, edge.role)
    points = route.points
    start, curves = points[0], points[1:]
    path = f"M{start[0]:.2f} {start[1]:.2f}C" + " ".join(f"{x:.2f} {y:.2f}" for x, y in curves)
    flow = 'stroke-width="1.1"' + (' stroke-dasharray="5 3"' if edge.role == "removed" else "")
    style = {"flow": flow, "repeat": 'stroke-width="1.1" stroke-dasharray="2 3"'}.get(
        edge.kind, 'stroke-width="1.8" stroke-dasharray="6 3"'
    )
    head = "" if route.tip is None else _arrow_head(points[-1], route.tip, colour)
    return (
        f'<g class="funcprop-edge funcprop-{edge.kind}" data-source={_attribute(edge.source)} '
        f"data-target={_attribute(edge.target)} data-role={_attribute(edge.role)}>"
        f"<title>{clean(edge.tooltip)}</title>"
        f'<path d="{path}" fill="none" stroke="{colour}" {style}/>{head}</g>'
    )


def _arrow_head(base: Point, tip: Point, colour: str) -> str:
    dx, dy = tip[0] - base[0], tip[1] - base[1]
    length = math.hypot(dx, dy) or 1.0
    nx, ny = -dy / length * 2.8, dx / length * 2.8
    corners = (tip, (base[0] + nx, base[1] + ny), (base[0] - nx, base[1] - ny))
    return f'<polygon points="{" ".join(f"{x:.2f},{y:.2f}" for x, y in corners)}" fill="{colour}"/>'


def _edge_label(edge: Edge, route: Route) -> str:
    if not edge.label:
        return ""
    x, y = route.label or route.middle
    # A residual's bytes stand on its dashes, and are what the picture of both sweeps is for.
    size, paper, colour = (
        (EDGE_LABEL + 2, 6, ink(edge.kind, edge.role)) if edge.kind == "residual" else (EDGE_LABEL, 3, FAINT)
    )
    # On paper of its own: that a stroke is painted under its text is not understood everywhere.
    width, height = text_width(edge.label, size) + paper, size * 1.1
    return (
        f'<rect x="{x - width / 2:.2f}" y="{y - height / 2:.2f}" width="{width:.2f}" height="{height:.2f}" '
        f'rx="3" fill="{PAPER}" fill-opacity="0.85"/>'
        f'<text x="{x:.2f}" y="{y + size * 0.35:.2f}" font-size="{size:g}" fill="{colour}">'
        f"{clean(edge.label)}</text>"
    )


def _legend(picture: Picture) -> Iterator[str]:
    for role in picture.legend:
        colours = ROLES[role]
        yield (
            f'<ellipse cx="9" cy="0" rx="9" ry="7" fill="{colours.fill}" stroke="{colours.stroke}"/>'
            f'<text x="26" y="4" font-size="12" text-anchor="start" fill="{INK}">'
            f"{clean(MEANINGS.get(role, role))}</text>"
        )
