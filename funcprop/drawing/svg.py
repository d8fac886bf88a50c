"""The picture as SVG: self-contained, without ids or styles that could meet those of the page it is on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from xml.sax.saxutils import escape, quoteattr

from funcprop.drawing.dot import box_label
from funcprop.drawing.geometry import DETAIL, EDGE_LABEL, LABEL, details_of, label_of, size_of, text_width
from funcprop.drawing.layout import Layout, Point, Route
from funcprop.drawing.palette import BOX, BOX_LINE, FAINT, INK, MEANINGS, PAPER, ROLES, ink, paint, stylesheet
from funcprop.drawing.picture import Box, Edge, Node, Picture, node_ids

_CLASS = "funcprop-graph"
_MARGIN = 12.0
_LEGEND_LINE = 22.0
_FONT = "Helvetica, Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif"


def svg(picture: Picture, layout: Layout, with_types: bool) -> str:
    """The picture at the places that the layout gives."""
    ids = node_ids(picture)
    ends = [layout.nodes[ids[key]][1] for key in (picture.origin, picture.goal) if key is not None]
    if len(ends) == 2 and ends[1] > ends[0]:
        # The objective is above the input.
        layout = layout.mirrored()
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
            f"<style>{clean(stylesheet(_CLASS))}</style>",
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
    left, top, right, bottom = layout.boxes[box.key]
    # The engine keeps room for the name at the top, which a mirrored layout has at the bottom.
    baseline = bottom - 6 if layout.is_mirrored else top + 13
    label = box_label(box)
    return (
        f'<g class="funcprop-box" data-key={_attribute(box.key)}><title>{clean(box.tooltip)}</title>'
        f'<rect x="{left:.2f}" y="{top:.2f}" width="{right - left:.2f}" height="{bottom - top:.2f}" rx="8" '
        f'fill="{BOX}" fill-opacity="0.7" stroke="{BOX_LINE}"/>'
        f'<text x="{left + 8:.2f}" y="{baseline:.2f}" font-size="11" text-anchor="start" fill="{FAINT}">'
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
    if label:
        first = y + LABEL * 0.35 - DETAIL * 0.62 * len(details)
        written = _with_subscript(label) if node.kind == "operator" else clean(label)
        lines.append(
            f'<text x="{x:.2f}" y="{first:.2f}" font-size="{LABEL:g}" fill="{text}">{written}</text>'
        )
    for i, line in enumerate(details):
        below = (
            y + (DETAIL * 1.1 if label else DETAIL * 0.35) + DETAIL * (1.25 * i - 0.62 * (len(details) - 1))
        )
        lines.append(
            f'<text x="{x:.2f}" y="{below:.2f}" font-size="{DETAIL:g}" fill="{FAINT}">{clean(line)}</text>'
        )
    return (
        f'<g class="funcprop-{node.kind}" data-key={_attribute(node.key)} data-name={_attribute(node.name)} '
        f"data-role={_attribute(node.role)}><title>{clean(node.tooltip)}</title>{outline}{''.join(lines)}</g>"
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
    x, y = route.label or _middle(route)
    # A residual's bytes stand on its dashes, and are what the picture of both sweeps is for.
    size, paper, colour = (
        (EDGE_LABEL + 2, 6, ink(edge.kind, edge.role)) if edge.kind == "residual" else (EDGE_LABEL, 3, FAINT)
    )
    return (
        f'<text x="{x:.2f}" y="{y + size * 0.35:.2f}" font-size="{size:g}" fill="{colour}" '
        f'stroke="{PAPER}" stroke-width="{paper}" stroke-linejoin="round" paint-order="stroke">'
        f"{clean(edge.label)}</text>"
    )


def _middle(route: Route) -> Point:
    """A point in the middle of an arrow: on the middle one of its Bézier curves."""
    first = 3 * ((len(route.points) - 1) // 3 // 2)
    a, b, c, d = route.points[first : first + 4]
    x, y = ((p + 3 * q + 3 * r + s) / 8 for p, q, r, s in zip(a, b, c, d, strict=True))
    return x, y


def _legend(picture: Picture) -> Iterator[str]:
    for role in picture.legend:
        colours = ROLES[role]
        yield (
            f'<ellipse cx="9" cy="0" rx="9" ry="7" fill="{colours.fill}" stroke="{colours.stroke}"/>'
            f'<text x="26" y="4" font-size="12" text-anchor="start" fill="{INK}">'
            f"{clean(MEANINGS.get(role, role))}</text>"
        )
