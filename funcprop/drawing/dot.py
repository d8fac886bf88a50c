"""Graphviz's language: for the layout, and for people who want to go on from there."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from funcprop.drawing.geometry import EDGE_LABEL, lines_of, size_of
from funcprop.drawing.palette import BOX_LINE, ink, paint
from funcprop.drawing.picture import Box, Edge, Node, Picture, by_box, node_ids

# With more residuals than this, their ends are not pulled together: with the 116 of a folded transformer that
# took Graphviz 2.43 over 40 s, without it 1.2 s. With few it matters which sweep is on the left.
MANY_RESIDUALS = 40


def dot(picture: Picture, with_types: bool, without: Collection[int] = ()) -> str:
    """The picture as a `digraph`, from left to right; nodes have fixed sizes.

    The edges whose numbers are in `without` are left out.
    """
    lines = [
        f"digraph {quoted(picture.title)} {{",
        "  graph [rankdir=LR, nodesep=0.25, ranksep=0.35, fontname=Helvetica];",
        "  node [fixedsize=true, fontname=Helvetica, fontsize=14, style=filled];",
        f"  edge [fontname=Helvetica, fontsize={EDGE_LABEL:g}, arrowsize=0.6];",
    ]
    ids = node_ids(picture)
    inside, boxes = by_box(picture)

    def contents(key: str | None, indent: str) -> Iterator[str]:
        for node in inside[key]:
            yield f"{indent}{ids[node.key]} [{_node(node, with_types)}];"
        for box in boxes[key]:
            label = box_label(box)
            yield f"{indent}subgraph {quoted('cluster_' + box.key)} {{"
            style = f'style=rounded, labeljust=l, color="{BOX_LINE}", fontsize=11'
            yield f"{indent}  graph [label={quoted(label)}, {style}];"
            yield from contents(box.key, indent + "  ")
            yield indent + "}"

    lines.extend(contents(None, "  "))
    loose = sum(edge.kind == "residual" for edge in picture.edges) > MANY_RESIDUALS
    for i, edge in enumerate(picture.edges):
        if i in without:
            continue
        lines.append(f"  {ids[edge.source]} -> {ids[edge.target]} [{_edge(edge, i, loose)}];")
    return "\n".join([*lines, "}"]) + "\n"


def box_label(box: Box) -> str:
    """The name of a box, with the number of its repetitions."""
    if box.count == 1:
        return box.label
    return f"{box.label} × {box.count}".strip() + ", sizes differ" * box.sizes_differ


def _node(node: Node, with_types: bool) -> str:
    size = size_of(node, with_types)
    shape = {"variable": "box", "operator": "ellipse", "scope": "box"}[node.kind]
    fill, stroke, _ = paint(node.kind, node.role)
    attributes = {
        "label": "\n".join(lines_of(node, with_types)),
        "shape": shape,
        "width": f"{size.width / 72:.4f}",
        "height": f"{size.height / 72:.4f}",
        "fillcolor": fill,
        "color": stroke,
        "tooltip": node.tooltip,
    }
    if node.kind == "scope":
        attributes["style"] = "filled,rounded"
    return _attributes(attributes)


def _edge(edge: Edge, number: int, loose: bool) -> str:
    attributes = {"id": f"e{number}", "tooltip": edge.tooltip, "color": ink(edge.kind, edge.role)}
    # For those who read the text: an engine hands on what it does not know.
    carried = {"variable": edge.variable, "dtype": edge.dtype, "nbytes": edge.nbytes}
    carried["dimensions"] = None if edge.shape is None else str(list(edge.shape))
    attributes |= {key: str(value) for key, value in carried.items() if value is not None}
    # What is written on a residual edge is set beside it afterwards: an engine takes long for labels on edges
    # as long as these.
    if edge.label and edge.kind != "residual":
        attributes["label"] = edge.label
    if edge.kind == "repeat":
        attributes |= {"style": "dashed", "constraint": "false"}
    if edge.kind == "residual":
        attributes |= {"style": "dashed", "penwidth": "1.6"} | ({"weight": "0"} if loose else {})
    return _attributes(attributes)


def _attributes(attributes: dict[str, str]) -> str:
    return ", ".join(f"{key}={quoted(value)}" for key, value in attributes.items())


def quoted(text: str) -> str:
    """A string of the language: quotes, backslashes, HTML entities and line ends are escaped."""
    escaped = text.replace("&", "&amp;").replace("\\", "\\\\").replace('"', '\\"')
    escaped = "".join(c if c.isprintable() or c == "\n" else "�" for c in escaped)
    return '"' + escaped.replace("\n", "\\n") + '"'
