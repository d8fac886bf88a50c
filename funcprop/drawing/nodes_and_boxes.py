"""From a graph to a picture: what is a node, what is inside which box, what is folded or collapsed."""

from __future__ import annotations

from funcprop.drawing.arrows import Arrows
from funcprop.drawing.folding import Folding
from funcprop.drawing.labels import merged, origin
from funcprop.drawing.nodes import Nodes
from funcprop.drawing.picture import Box, Picture
from funcprop.drawing.representatives import FEW, Fold, Representatives, blocks_of
from funcprop.drawing.request import Shown
from funcprop.drawing.scopes import Scope


def assemble(shown: Shown, depth: int | None, fold: Fold, unnamed: bool | None) -> Picture:
    """The picture of a graph; the arguments are those of `fp.draw`."""
    return assembled(shown, depth, blocks_of(shown, fold), unnamed)


def assembled(
    shown: Shown,
    depth: int | None,
    blocks: tuple[Scope, Folding],
    unnamed: bool | None,
    closed: bool = False,
) -> Picture:
    """The picture of a graph whose `blocks` (`blocks_of`) are known: several pictures may have the same.

    `closed` also makes one node of repeated blocks that nobody named, at the depth at which scopes are.
    """
    known = Representatives(shown, depth, blocks, unnamed, closed)
    nodes = Nodes(known)
    arrows = Arrows(known, nodes)
    arrows.draw()
    boxes = tuple(
        Box(
            known.keys[id(scope)],
            known.title(scope),
            "/".join(scope.path),
            known.box_key(scope.parent or known.root),
            scope.count,
            scope.sizes_differ,
        )
        for scope in known.root.scopes()
        if known.collapsed(scope) is None
    )
    first = origin(shown, {key.removeprefix("v:") for key in nodes.made})
    goal = next((f"v:{v.name}" for v in shown.graph.outputs if f"v:{v.name}" in nodes.made), None)
    return Picture(
        shown.graph.name,
        tuple(nodes.with_members()),
        tuple(merged(arrows.shared(), nodes.made, few=len(known.scope_of) <= FEW)),
        boxes,
        shown.legend,
        None if first is None else f"v:{first}",
        goal,
    )
