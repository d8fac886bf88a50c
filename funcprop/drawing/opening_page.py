"""A page on which modules open: the picture, and what is inside of each as a picture that takes its place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any, NamedTuple, Protocol

from funcprop.drawing.picture import Picture


class Opening(Protocol):
    """A drawing in which modules open."""

    @property
    def picture(self) -> Picture:
        """What is drawn."""

    @property
    def inside(self) -> Mapping[str, Opening]:
        """What is in each module, by the key of its node."""

    def svg(self) -> str:
        """The picture as SVG."""


class PagePicture(NamedTuple):
    """One picture of the page: its drawing, the number of that around it, and the key of its node there."""

    drawing: Any
    around: int
    key: str


def pictures(drawing: Opening, most: int | None = None) -> list[PagePicture]:
    """A drawing and what is inside of it, from the outside, each after what it is in; up to `most` nodes."""
    found, nodes = [PagePicture(drawing, -1, "")], len(drawing.picture.nodes)
    for number, (drawn, _, _) in enumerate(found):
        for key, inner in drawn.inside.items():
            nodes += len(inner.picture.nodes)
            if most is not None and nodes > most:
                return found
            found.append(PagePicture(inner, number, key))
    return found


def page(drawing: Opening) -> str:
    """The page; it loads nothing, and without a script it shows all pictures, one below the other."""
    shown = pictures(drawing)
    body = "\n".join(_section(number, picture, shown) for number, picture in enumerate(shown))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(drawing.picture.title)}'
        f'</title><meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" '
        f'href="data:,"><style>{_STYLE}</style></head>\n<body>{body}\n<script>{_SCRIPT}</script></body></html>\n'
    )


def _section(number: int, picture: PagePicture, shown: list[PagePicture]) -> str:
    path = " › ".join(_crumbs(number, shown))
    return (
        f'<section id="p{number}" data-around="{picture.around}" data-key="{escape(picture.key)}">'
        f"<nav>{path}</nav>{picture.drawing.svg()}</section>"
    )


def _crumbs(number: int, shown: list[PagePicture]) -> Iterator[str]:
    around = shown[number].around
    if around >= 0:
        yield from _crumbs(around, shown)
    yield f'<a href="#p{number}">{escape(shown[number].drawing.picture.title)}</a>'


_STYLE = """
:root{color-scheme:light dark}
body{margin:0;padding:8px;font:14px/1.5 system-ui,sans-serif}
svg{max-width:100%;height:auto}
nav{margin:0 0 6px;overflow-wrap:anywhere}
section{margin-bottom:24px}
.opens{cursor:zoom-in}
.opens:hover > rect:first-of-type,.opens:focus-visible > rect:first-of-type{stroke-width:2.6}
"""
_SCRIPT = """
const sections = [...document.querySelectorAll("section")];
for (const [number, section] of sections.entries()) {
  const around = sections[section.dataset.around];
  if (!around) continue;
  const modules = [...around.querySelectorAll(".funcprop-scope")];
  const node = modules.find((g) => g.dataset.key === section.dataset.key);
  if (!node) continue;
  node.classList.add("opens");
  node.setAttribute("tabindex", "0");
  node.setAttribute("role", "button");
  node.addEventListener("click", () => show(number));
  node.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    show(number);
  });
}
function show(number) {
  for (const [i, section] of sections.entries()) section.hidden = i !== number;
  scrollTo(0, 0);
}
addEventListener("click", (event) => {
  const link = event.target.closest("nav a");
  if (link) { event.preventDefault(); show(Number(link.getAttribute("href").slice(2))); }
});
addEventListener("keydown", (event) => {
  const open = sections.find((section) => !section.hidden);
  if (event.key === "Escape" && open.dataset.around !== "-1") show(Number(open.dataset.around));
});
show(0);
"""
