"""A picture that is much wider than high, cut into rows like a line of text.

The layout is cut between columns, where few arrows cross. An arrow that crosses a cut goes on along the edge
of the picture to the beginning of the next row, so that it can be followed.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

from funcprop.drawing.geometry import Size
from funcprop.drawing.layout import Layout, Point, Rectangle, Route

# A row is about so wide, in points. Narrower pictures, and those nearly as high as wide, are one row.
ROW = 1150.0
# Rows for a phone: names of 12 points are read at a scale of 0.7.
NARROW = 430.0
_ASPECT = 2.2
# What would need more rows is a map, not a text.
_MOST_ROWS = 12
_LANE = 5.0  # between arrows that go on in the next row
_GAP = 26.0
_BOX = 3  # arrows that are cut rather than one box
_PADDING = 14.0  # around what is in a box


def in_rows(layout: Layout, sizes: Mapping[str, Size], row: float = ROW) -> Layout:
    """The layout in rows; itself if it is not too wide. `sizes` are those of its nodes."""
    if layout.width <= row * 1.25 or (row == ROW and layout.width <= _ASPECT * layout.height):
        return layout
    if layout.width > _MOST_ROWS * row:
        return layout
    cuts = _cuts(layout, sizes, row)
    return _Rows(layout, cuts, sizes).layout() if cuts else layout


def _cuts(layout: Layout, sizes: Mapping[str, Size], row: float) -> list[float]:
    """Where the picture is cut: between nodes, across as few boxes and arrows as may be."""
    count = -(-int(layout.width) // int(row))
    taken = sorted(
        (x - sizes[n].width / 2 - 4, x + sizes[n].width / 2 + 4) for n, (x, _) in layout.nodes.items()
    )
    free, right = [], 0.0
    for start, end in taken:
        if start > right:
            free.append((right + start) / 2)
        right = max(right, end)
    spans = [(min(x for x, _ in r.points), max(x for x, _ in r.points)) for r in layout.edges]
    boxes = [(left, right) for (left, _, right, _), *_ in layout.boxes.values()]
    # A box that is cut is worse than an arrow that goes on in the next row.
    spans += [span for span in boxes for _ in range(_BOX)]
    found: list[float] = []
    for number in range(1, count):
        wanted = layout.width * number / count
        near = [
            x for x in free if abs(x - wanted) < 0.2 * layout.width / count and x > (found or [0.0])[-1] + 100
        ]
        if near:
            found.append(min(near, key=lambda x: (sum(a < x < b for a, b in spans), abs(x - wanted))))
    return found


class _Rows:
    """The picture in pieces from `starts[i]` to `starts[i + 1]`, each moved to a row of its own."""

    def __init__(self, layout: Layout, cuts: Sequence[float], sizes: Mapping[str, Size]) -> None:
        self.whole, self.sizes = layout, sizes
        self.starts = [0.0, *cuts, layout.width + 1]
        self.parts = {key: self.parts_of(box) for key, (box, *_) in layout.boxes.items()}
        pieces = [(route, _pieces(route.points, cuts)) for route in layout.edges]
        crossing = [sum(len(found) > 1 for _, found in pieces)]
        self.margin = _LANE * (crossing[0] + 2)
        self.pieces = pieces
        self.lane = 0
        tops, bottoms = self.extents()
        self.offsets, y = [], 0.0
        for top, bottom in zip(tops, bottoms, strict=True):
            self.offsets.append(y - top)
            y += bottom - top + _GAP + self.margin
        self.height = y - _GAP - self.margin
        self.tops, self.bottoms = tops, bottoms
        widths = [b - a for a, b in itertools.pairwise(self.starts)]
        self.width = max(widths) + 2 * self.margin

    def row(self, x: float) -> int:
        return max(i for i, start in enumerate(self.starts[:-1]) if x >= start)

    def extents(self) -> tuple[list[float], list[float]]:
        """The highest and the lowest of what is in each row."""
        ys: list[list[float]] = [[] for _ in self.starts[1:]]
        for x, y in self.whole.nodes.values():
            ys[self.row(x)] += [y - 24, y + 24]
        for parts in self.parts.values():
            for i, (_, top, _, bottom) in parts:
                ys[i] += [top, bottom]
        for _, found in self.pieces:
            for i, points in found:
                ys[i] += [y for _, y in points]
        return [min(found, default=0.0) for found in ys], [max(found, default=0.0) for found in ys]

    def moved(self, i: int, point: Point) -> Point:
        return point[0] - self.starts[i] + self.margin, point[1] + self.offsets[i]

    def parts_of(self, box: Rectangle) -> list[tuple[int, Rectangle]]:
        """The parts of a box in the rows in which it has nodes; the first, with the label, has its height."""
        left, top, right, bottom = box
        parts: list[tuple[int, Rectangle]] = []
        for i in range(self.row(left), self.row(right) + 1):
            a, b = max(left, self.starts[i] - 2), min(right, self.starts[i + 1] + 2)
            inside = [
                (y - self.sizes[n].height / 2, y + self.sizes[n].height / 2)
                for n, (x, y) in self.whole.nodes.items()
                if a < x < b and top < y < bottom
            ]
            if not parts:
                parts.append((i, (a, top, b, bottom)))
            elif inside:
                high, low = min(y for y, _ in inside), max(y for _, y in inside)
                parts.append((i, (a, max(top, high - _PADDING), b, min(bottom, low + _PADDING))))
        return parts

    def box(self, key: str) -> tuple[Rectangle, ...]:
        """The parts of a box in their rows."""
        return tuple((*self.moved(i, part[:2]), *self.moved(i, part[2:])) for i, part in self.parts[key])

    def route(self, route: Route, pieces: Sequence[tuple[int, list[Point]]]) -> Route:
        """An arrow, with what leads it from the end of a row to the beginning of the next."""
        points = [self.moved(pieces[0][0], p) for p in pieces[0][1]]
        lane = 0.0
        if len(pieces) > 1:
            self.lane += 1
            lane = _LANE * self.lane
        for i, part in pieces[1:]:
            start = self.moved(i, part[0])
            x, y = points[-1]
            forwards = part[0][0] <= self.starts[i] + 1
            ends = [b - a + self.margin for a, b in itertools.pairwise(self.starts)]
            out = ends[i - 1] + lane if forwards else self.margin - lane
            back = self.margin - lane if forwards else ends[i] + lane
            row = i - 1 if forwards else i
            between = self.bottoms[row] + self.offsets[row] + _GAP / 2 + lane
            corners = [(out, y), (out, between), (back, between), (back, start[1]), start]
            for corner in corners:
                points += [(x, y), corner, corner]
                x, y = corner
            points += [self.moved(i, p) for p in part[1:]]
        tip = None if route.tip is None else self.moved(self.row(route.points[-1][0]), route.tip)
        label = None if route.label is None else self.moved(self.row(route.label[0]), route.label)
        return Route(tuple(points), tip, label)

    def layout(self) -> Layout:
        """The whole."""
        return replace(
            self.whole,
            width=self.width,
            height=self.height,
            nodes={n: self.moved(self.row(p[0]), p) for n, p in self.whole.nodes.items()},
            boxes={key: self.box(key) for key in self.whole.boxes},
            edges=tuple(self.route(route, found) for route, found in self.pieces),
        )


def _pieces(points: Sequence[Point], cuts: Sequence[float]) -> list[tuple[int, list[Point]]]:
    """A chain of Bézier curves cut where it crosses; the number of the row of each piece."""
    pieces: list[tuple[int, list[Point]]] = []
    for start in range(0, len(points) - 3, 3):
        rest = list(points[start : start + 4])
        while rest:
            first, rest = _cut(rest, cuts)
            row = sum(first[0][0] / 2 + first[3][0] / 2 >= cut for cut in cuts)
            if pieces and pieces[-1][0] == row:
                pieces[-1][1].extend(first[1:])
            else:
                pieces.append((row, first))
    return pieces


def _cut(curve: list[Point], cuts: Sequence[float]) -> tuple[list[Point], list[Point]]:
    """A Bézier curve up to where it first crosses a cut, and the rest of it."""
    left, right = min(x for x, _ in curve), max(x for x, _ in curve)
    cuts = [cut for cut in cuts if left < cut < right]
    if not cuts:
        return curve, []
    steps = 64
    xs = [_at(curve, k / steps)[0] for k in range(steps + 1)]
    for k in range(1, steps):
        for cut in cuts:
            if (xs[k - 1] - cut) * (xs[k] - cut) < 0 and abs(xs[0] - cut) > 1e-6:
                low, high = (k - 1) / steps, k / steps
                for _ in range(30):
                    middle = (low + high) / 2
                    same = (_at(curve, middle)[0] - cut) * (xs[k - 1] - cut) > 0
                    low, high = (middle, high) if same else (low, middle)
                return _split(curve, low, cut)
    return curve, []


def _at(curve: Sequence[Point], t: float) -> Point:
    weights = (1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3
    x, y = (sum(w * p[axis] for w, p in zip(weights, curve, strict=True)) for axis in (0, 1))
    return x, y


def _split(curve: Sequence[Point], t: float, cut: float) -> tuple[list[Point], list[Point]]:
    """Both parts of a Bézier curve by De Casteljau's construction; they meet on the cut."""
    level, left, right = list(curve), [curve[0]], [curve[-1]]
    while len(level) > 1:
        level = [((1 - t) * a[0] + t * b[0], (1 - t) * a[1] + t * b[1]) for a, b in itertools.pairwise(level)]
        left.append(level[0])
        right.insert(0, level[-1])
    left[-1] = right[0] = (cut, left[-1][1])
    return left, right
