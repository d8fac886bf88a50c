"""Colours: fill, line and text of nodes by what they are, and of arrows.

Names have a contrast of at least 11 : 1 with what they stand on, small print 6 : 1, lines 4.5 : 1; so too on
the dark paper that the picture has on a dark page.
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
    "waiting": Paint(PAPER, FAINT, INK),
    "added": Paint("#d2f0d2", "#146c2e", INK),
    "removed": Paint("#ffd7d5", "#a40e26", INK),
}

# Each colour on a dark page.
DARK = {
    PAPER: "#141a21",
    INK: "#eef3f8",
    FAINT: "#b8c4d0",
    BOX: "#1c242d",
    BOX_LINE: "#5c6b79",
    "#eceff3": "#262f39",
    "#dceafa": "#15304a",
    "#1f5d99": "#82b9ee",
    "#fde3cf": "#47280f",
    "#a8480b": "#f2a168",
    "#fff7d6": "#383009",
    "#6b5500": "#dcc25a",
    "#d5f0e3": "#0e382a",
    "#0b6b4b": "#6fd0a9",
    "#f3d9ea": "#451c37",
    "#8b2a68": "#e59cc8",
    "#d2f0d2": "#133a1c",
    "#146c2e": "#79cf92",
    "#ffd7d5": "#4d1a1c",
    "#a40e26": "#ff9a9a",
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


def stylesheet(name: str) -> str:
    """Rules by which an `<svg>` of this class follows the theme of the page, or of the notebook, it is in.

    The colours stand in the attributes; where the rules are not understood, those remain, and every rule
    of the page that is meant for the picture goes over these.
    """
    svg = f"svg.{name}"
    rules = [f":where({svg}){{color-scheme:light dark}}"]
    for scheme, notebooks in _NOTEBOOKS.items():
        rules.append(f":where({','.join(f'{n} {svg}' for n in notebooks)}){{color-scheme:{scheme}}}")
    rules.extend(
        f':where({svg} [{attribute}="{light}"]){{{attribute}:light-dark({light},{dark})}}'
        for light, dark in DARK.items()
        for attribute in ("fill", "stroke")
    )
    return "\n".join(rules)


# JupyterLab, VS Code and Colab say which theme they have, whatever the system's is.
_NOTEBOOKS = {
    "light": ('[data-jp-theme-light="true"]', ".vscode-light", 'html[theme="light"]'),
    "dark": ('[data-jp-theme-light="false"]', ".vscode-dark", 'html[theme="dark"]'),
}
