"""In a notebook graphs and differences show themselves: the room that draws is loaded when one is shown."""

from typing import Any

from funcprop.graph.pictured import Pictured


def svg_of(thing: Any) -> str | None:
    """The picture of a graph or a difference."""
    from funcprop.drawing.draw import notebook_svg

    return notebook_svg(thing)


Pictured.svg_of = staticmethod(svg_of)
