"""Colours: fill, line and text of nodes by what they are, and of arrows.

Names have a contrast of at least 11 : 1 with what they stand on, small print 6 : 1, lines 4.5 : 1. The paper
is part of the picture, so that it looks the same on a dark page.
"""

from __future__ import annotations

from typing import NamedTuple

PAPER, INK, FAINT, BOX, BOX_LINE = "#ffffff", "#1b2733", "#3e4c59", "#f5f7fa", "#9aa5b1"


class Paint(NamedTuple):
    """Fill, line and text of a node."""

    fill: str
    stroke: str
    text: str


_KINDS = {
    "variable": Paint("#ffffff", INK, INK),
    "operator": Paint("#dceafa", INK, INK),
    "scope": Paint("#eceff3", INK, INK),
}

# The Okabe–Ito hues, lightened: they differ for the colour-blind too.
ROLES = {
    "forward": Paint("#dceafa", "#1f5d99", INK),
    "backward": Paint("#fde3cf", "#a8480b", INK),
    "saved": Paint("#fff7d6", "#6b5500", INK),
    "primal": Paint("#dceafa", "#1f5d99", INK),
    "tangent": Paint("#d5f0e3", "#0b6b4b", INK),
    "cotangent": Paint("#fde3cf", "#a8480b", INK),
    "tangent of cotangent": Paint("#f3d9ea", "#8b2a68", INK),
    "added": Paint("#d2f0d2", "#146c2e", INK),
    "removed": Paint("#ffd7d5", "#a40e26", INK),
}

# What a role means, where its name does not say it.
MEANINGS = {
    "saved": "saved for the backward sweep",
    "primal": "primal: the function",
    "tangent": "tangent: along the direction v",
    "cotangent": "cotangent: of the gradient",
    "tangent of cotangent": "tangent of cotangent: of the Hessian-vector product",
}


def paint(kind: str, role: str) -> Paint:
    """The colours of a node; a square keeps its white paper and takes the line of its role."""
    if role not in ROLES:
        return _KINDS[kind]
    colours = ROLES[role]
    if kind == "variable" and role not in ("saved", "added", "removed"):
        return Paint(PAPER, colours.stroke, colours.text)
    return colours


def ink(kind: str, role: str) -> str:
    """The colour of an arrow."""
    if role in ROLES:
        return ROLES[role].stroke
    return {"flow": INK, "residual": ROLES["saved"].stroke, "repeat": FAINT}[kind]
