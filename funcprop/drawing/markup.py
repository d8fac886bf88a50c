"""The picture as Mermaid text and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict

from funcprop.drawing.dot import box_label
from funcprop.drawing.geometry import lines_of
from funcprop.drawing.palette import ROLES, paint
from funcprop.drawing.picture import Node, Picture, by_box, node_ids


def as_json(picture: Picture) -> str:
    """The picture as one JSON object; safe inside of a `<script>` element, too."""
    text = json.dumps(asdict(picture), ensure_ascii=False, allow_nan=False)
    # The line separators and angle brackets end strings or elements in JavaScript and HTML.
    for c in "<>&\u2028\u2029":
        text = text.replace(c, f"\\u{ord(c):04x}")
    return text


def mermaid(picture: Picture, with_types: bool) -> str:
    """The picture as a Mermaid flowchart."""
    ids = node_ids(picture)
    inside, boxes = by_box(picture)
    box_ids = {box.key: f"b{i}" for i, box in enumerate(picture.boxes)}

    def contents(key: str | None, indent: str) -> Iterator[str]:
        for node in inside[key]:
            yield indent + ids[node.key] + _shape(node, with_types)
        for box in boxes[key]:
            yield f'{indent}subgraph {box_ids[box.key]}["{_text(box_label(box)) or " "}"]'
            yield from contents(box.key, indent + "  ")
            yield indent + "end"

    lines = ["flowchart LR", *contents(None, "  ")]
    for edge in picture.edges:
        arrow = {"flow": "-->", "repeat": "-.->", "residual": "==>"}[edge.kind]
        label = f'|"{_text(edge.label)}"|' if edge.label else ""
        lines.append(f"  {ids[edge.source]} {arrow}{label} {ids[edge.target]}")
    for i, role in enumerate(r for r in ROLES if any(node.role == r for node in picture.nodes)):
        members = ",".join(ids[node.key] for node in picture.nodes if node.role == role)
        fill, stroke, text = paint("operator", role)
        lines += [
            f"  classDef role{i} fill:{fill},stroke:{stroke},color:{text}",
            f"  class {members} role{i}",
        ]
    return "\n".join(lines) + "\n"


def _shape(node: Node, with_types: bool) -> str:
    text = "<br/>".join(map(_text, lines_of(node, with_types))) or " "
    opening, closing = {"variable": ("[", "]"), "operator": ("((", "))"), "scope": ("(", ")")}[node.kind]
    return f'{opening}"{text}"{closing}'


def _text(text: str) -> str:
    """Text between quotes: what has a meaning for Mermaid, Markdown or HTML is written by its number."""
    return "".join(c if _is_plain(c) else f"#{ord(c)};" for c in text)


def _is_plain(c: str) -> bool:
    return c.isalnum() or c in " .,:/=+[]_" or (ord(c) > 127 and c.isprintable())
