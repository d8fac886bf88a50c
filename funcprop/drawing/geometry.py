"""How large things are, so that the layout does not depend on an engine's fonts. Lengths are in points."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

from funcprop.drawing.picture import Node

LABEL, DETAIL, EDGE_LABEL = 14.0, 9.0, 9.0
_LEAST = 34.0
_LONGEST_LABEL = 48


@dataclass(frozen=True)
class Size:
    """Width and height of a node."""

    width: float
    height: float


def text_width(text: str, size: float) -> float:
    """An upper estimate of the width of a line in a sans-serif face."""
    return size * sum(_character(c) for c in text)


def _character(c: str) -> float:
    if unicodedata.east_asian_width(c) in "WF":
        return 1.05
    if unicodedata.combining(c):
        return 0.0
    if c in "ijlI.,:;'|!()[]/ ft":
        return 0.38
    return 0.85 if c in "mwMW@%—…" else 0.72 if c.isupper() else 0.6


def clipped(text: str, longest: int = _LONGEST_LABEL) -> str:
    """The end of a text that is too long for a node; the end of a path says most."""
    return text if len(text) <= longest else "…" + text[-(longest - 1) :]


def label_of(node: Node) -> str:
    """The label as it is written into the node, with the number of repetitions."""
    return clipped(node.label) + (f" × {node.count}" if node.count > 1 else "")


def lines_of(node: Node, with_types: bool) -> list[str]:
    """Everything that is written into the node, as it stands."""
    return [line for line in (label_of(node), *details_of(node, with_types)) if line]


def details_of(node: Node, with_types: bool) -> tuple[str, ...]:
    """The small lines of a node."""
    lines = node.details if with_types else node.brief
    return tuple(map(clipped, lines.split("\n"))) if lines else ()


def size_of(node: Node, with_types: bool) -> Size:
    """The size of a node: a square, a circle or a box, widened for long names."""
    details = max(details_of(node, with_types), tuple(filter(None, node.reserved.split("\n"))), key=len)
    width = max(
        [text_width(label_of(node), LABEL) + 12, *(text_width(line, DETAIL) + 12 for line in details)]
    )
    height = (LABEL * 1.2 if node.label else 0) + 12 + sum(DETAIL * 1.25 for _ in details)
    if node.kind == "scope":
        return Size(max(width + 10, 60.0), height + 10)
    return Size(max(width, _LEAST), max(height, _LEAST))
