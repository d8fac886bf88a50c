"""What is drawn, as plain data: nodes, edges, and the boxes around them; no geometry and no notation.

Every output (SVG, DOT, Mermaid, JSON) is written from a `Picture`.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

from funcprop.graph.graph import bytes_text

NodeKind = Literal["variable", "operator", "scope"]
EdgeKind = Literal["flow", "residual", "repeat"]


@dataclass(frozen=True)
class Node:
    """A square (variable), a circle (operator), or a scope that is collapsed into one node.

    `label` is written into it, and beneath that `brief` or, where types are asked for, `details`; `tooltip`
    is the full story. `role` is what it is coloured by. `count` says for how many it stands, where repeated
    blocks are folded. `members` are the names of the operators that it stands for, or of the variables if it
    is a square, in the order in which they are computed. Of a collapsed scope, `inside` are the operators of
    its first repetition. `reserved` are small lines for which there is room, though they are not written.
    """

    key: str
    kind: NodeKind
    label: str
    brief: str
    details: str
    tooltip: str
    name: str
    box: str | None
    role: str = ""
    count: int = 1
    members: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()
    reserved: str = ""


@dataclass(frozen=True)
class Edge:
    """An arrow: the value `variable` flows from one node to another.

    Between collapsed scopes, one arrow stands for several values: `variable` lists them, `nbytes` is their
    sum, and `shape` and `dtype` are None.

    Where it leaves repeated blocks that are drawn once, `leaves` says for each of them, from the outside,
    whether it comes from the `"last"` or from `"every"` repetition; where it enters some, `enters` says
    whether the `"first"` alone reads it (the others what `repeat` brings back) or `"every"` one. From one
    group to another it may lead from `"each"` to `"each"` repetition, or `"each, backwards"`. An arrow
    within a repetition, or by `repeat` to the next, has none of these words for it.
    """

    source: str
    target: str
    variable: str
    shape: tuple[int, ...] | None
    dtype: str | None
    nbytes: int | None
    kind: EdgeKind = "flow"
    role: str = ""
    label: str = ""
    leaves: tuple[str, ...] = ()
    enters: tuple[str, ...] = ()

    @property
    def tooltip(self) -> str:
        """The value that flows, with its type and size, and from and to which repetitions."""
        text = f"{self.variable}: {value_text(self.shape, self.dtype, self.nbytes)}"
        for preposition, words in (("from", self.leaves), ("to", self.enters)):
            if words:
                text += f"\n{preposition} {' of '.join(f'{word} repetition' for word in words[::-1])}"
        return text


@dataclass(frozen=True)
class Box:
    """A scope that is drawn open: a box around what is inside."""

    key: str
    label: str
    tooltip: str
    parent: str | None
    count: int = 1
    sizes_differ: bool = False


@dataclass(frozen=True)
class Picture:
    """A drawing without geometry. `origin` and `goal` are the nodes that are lower left and upper right."""

    title: str
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    boxes: tuple[Box, ...]
    legend: tuple[str, ...] = ()
    origin: str | None = None
    goal: str | None = None


def node_ids(picture: Picture) -> dict[str, str]:
    """A plain identifier for every node, by its key: keys contain what users call things."""
    return {node.key: f"n{i}" for i, node in enumerate(picture.nodes)}


def by_box(
    picture: Picture,
) -> tuple[dict[str | None, list[Node]], dict[str | None, list[Box]]]:
    """The nodes and the boxes that stand directly in each box; None is outside of all."""
    nodes: dict[str | None, list[Node]] = defaultdict(list)
    boxes: dict[str | None, list[Box]] = defaultdict(list)
    for node in picture.nodes:
        nodes[node.box].append(node)
    for box in picture.boxes:
        boxes[box.parent].append(box)
    return nodes, boxes


def value_text(shape: tuple[int, ...] | None, dtype: str | None, nbytes: int | None) -> str:
    """`float32[3,4], 48 B`."""
    parts = [] if shape is None else [f"{dtype}[{','.join(map(str, shape))}]"]
    if nbytes is not None:
        parts.append(bytes_text(nbytes))
    return ", ".join(parts) or "no size"
