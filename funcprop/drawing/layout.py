"""Where everything stands: computed by Graphviz's `dot`, or by `graphviz-pure`, from the same text."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from funcprop.drawing.geometry import Size

Engine = Literal["dot", "graphviz-pure"]
ENGINES: tuple[Engine, ...] = ("dot", "graphviz-pure")

# From this many nodes on, an engine is told to spend less. Nested boxes cost Graphviz 2.43 the most: a
# transformer of 3,021 operators took it 20 s with them and 3 s without, and graphviz-pure 2.5 s with them.
MANY = 800
_FASTER = ("nslimit=0.01", "nslimit1=0.01", "mclimit=0.01", "searchsize=5", "splines=line")
_WITHOUT_BOXES = ("clusterrank=none",)
Point = tuple[float, float]
Rectangle = tuple[float, float, float, float]
_HEAD = 6.0  # the length of an arrow head


class DrawingError(RuntimeError):
    """A graph cannot be laid out or written; the message says why and what to do."""


@dataclass(frozen=True)
class Route:
    """An arrow: the points of a chain of Bézier curves, its tip, and the centre of its label."""

    points: tuple[Point, ...]
    tip: Point | None
    label: Point | None

    @property
    def middle(self) -> Point:
        """A point in the middle of the arrow: on the middle one of its Bézier curves."""
        first = 3 * ((len(self.points) - 1) // 3 // 2)
        return _on_curve(self.points[first : first + 4], 0.5)


@dataclass(frozen=True)
class Layout:
    """Centres of nodes by their ids, routes of edges in order, boxes as left, top, right, bottom.

    y goes down. An engine may leave out boxes; in a picture of several rows a box may have several parts.
    """

    width: float
    height: float
    nodes: dict[str, Point]
    boxes: dict[str, tuple[Rectangle, ...]]
    edges: tuple[Route, ...]
    is_mirrored: bool = False

    def mirrored(self) -> Layout:
        """The picture from below."""
        return Layout(
            self.width,
            self.height,
            {key: self._mirror(p) for key, p in self.nodes.items()},
            {
                k: tuple((left, self.height - b, right, self.height - t) for left, t, right, b in parts)
                for k, parts in self.boxes.items()
            },
            tuple(
                Route(
                    tuple(map(self._mirror, e.points)),
                    None if e.tip is None else self._mirror(e.tip),
                    None if e.label is None else self._mirror(e.label),
                )
                for e in self.edges
            ),
            not self.is_mirrored,
        )

    def _mirror(self, point: Point) -> Point:
        return point[0], self.height - point[1]


class Direct(NamedTuple):
    """An arrow of which the engine is not told: from the side of one node to that of another."""

    source: str
    source_size: Size
    target: str
    target_size: Size
    is_residual: bool


def lay_out(
    source: str,
    nodes: int,
    edges: int,
    engine: Engine | None,
    timeout: float,
    direct: Mapping[int, Direct],
) -> Layout:
    """Lay out a text in Graphviz's language whose edges have the ids `e0`, `e1` …, but for those in `direct`.

    Of many nodes, `dot` lays out no boxes, and neither engine those of the sweeps; where an engine fails at
    boxes, there are none.

    Raises:
        DrawingError: there is no engine, or it failed, or it took longer than `timeout` seconds.
    """
    chosen, program = find_engine(engine, ENGINES if nodes <= MANY else ENGINES[::-1])
    # Two boxes around thousands of nodes, the sweeps, cost either engine most of its time.
    plain = chosen == "dot" or any(arrow.is_residual for arrow in direct.values())
    settings = () if nodes <= MANY else _FASTER + _WITHOUT_BOXES if plain else _FASTER
    try:
        done = _run(program, source, settings, timeout)
        if done.returncode and not set(_WITHOUT_BOXES) <= set(settings):
            # graphviz-pure 0.2.2 finds no ranks for some boxes within boxes.
            done = _run(program, source, (*settings, *_WITHOUT_BOXES), timeout)
    except subprocess.TimeoutExpired:
        raise DrawingError(
            f"fp.draw: the layout by {program} took longer than {timeout:g} seconds; collapse scopes "
            "(`depth=`), leave out unnamed values (`unnamed=False`), or give it more (`timeout=`)."
        ) from None
    except OSError as error:
        raise DrawingError(f"fp.draw: {program} cannot be run: {error}.") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()[-2000:]
        raise DrawingError(f"fp.draw: {program} failed with exit code {done.returncode}: {said}")
    return _parse(json.loads(done.stdout), edges, direct)


def _run(
    program: str, source: str, settings: Sequence[str], timeout: float
) -> subprocess.CompletedProcess[bytes]:
    command = [program, "-Tjson0", *(f"-G{setting}" for setting in settings)]
    return subprocess.run(command, input=source.encode(), capture_output=True, timeout=timeout, check=False)


def require_known(engine: Engine | None) -> None:
    """Raise a DrawingError if there is no engine of this name; None stands for any."""
    if engine is not None and engine not in ENGINES:
        raise DrawingError(f"fp.draw: engine={engine!r} is not known; choose one of {', '.join(ENGINES)}.")


def find_engine(engine: Engine | None, preferred: Sequence[Engine] = ENGINES) -> tuple[Engine, str]:
    """An engine and its program; without one asked for, the first of the preferred that is installed.

    Raises:
        DrawingError: it is not installed, or there is no engine of this name.
    """
    require_known(engine)
    for name in preferred if engine is None else (engine,):
        # A wheel's program is beside the interpreter, also when that directory is not on the path.
        beside = [sysconfig.get_path("scripts"), str(Path(sys.executable).parent)]
        found = shutil.which(name) or next(filter(None, (shutil.which(name, path=d) for d in beside)), None)
        if found is not None:
            return name, found
    wanted = "a layout engine" if engine is None else f"{engine!r}"
    raise DrawingError(
        f"fp.draw: {wanted} is not installed; pip install 'funcprop[draw]' brings graphviz-pure, and "
        "Graphviz's own `dot` is used where there is one. `.dot()`, `.mermaid()` and `.json()` need neither."
    )


def _parse(found: dict[str, Any], edges: int, direct: Mapping[int, Direct]) -> Layout:
    height = _numbers(found["bb"])[3]

    def point(text: str) -> Point:
        x, y = _numbers(text)
        return x, height - y

    nodes: dict[str, Point] = {}
    boxes: dict[str, tuple[float, float, float, float]] = {}
    corners: list[Point] = []
    for item in found.get("objects", ()):
        if "pos" in item:
            x, y = nodes[item["name"]] = point(item["pos"])
            half, tall = 36 * float(item["width"]), 36 * float(item["height"])
            corners += (x - half, y - tall), (x + half, y + tall)
        elif "bb" in item:
            left, bottom, right, top = _numbers(item["bb"])
            boxes[item["name"].removeprefix("cluster_")] = left, height - top, right, height - bottom
            corners += (left, height - top), (right, height - bottom)
    routes = {item["id"]: _route(item, height) for item in found.get("edges", ())}
    for route in routes.values():
        corners += (*route.points[::3], *filter(None, (route.tip, route.label)))
    (left, top), (right, bottom) = (
        tuple(map(f, zip(*(corners or [(0.0, 0.0)]), strict=True))) for f in (min, max)
    )
    # Graphviz 2.43 lets a curve shoot far out of the picture and come back, and widens its frame for it. A
    # curve stays in the hull of its points; those between the joints are moved to the edge of what is there.
    frame = left, top, right, bottom
    routes = {key: _within(route, frame) for key, route in routes.items()}
    routes |= {f"e{i}": _direct(nodes, arrow) for i, arrow in direct.items()}
    return _framed(nodes, boxes, [routes[f"e{i}"] for i in range(edges)], frame)


def _within(route: Route, frame: tuple[float, float, float, float]) -> Route:
    left, top, right, bottom = frame
    points = tuple((min(max(x, left), right), min(max(y, top), bottom)) for x, y in route.points)
    return Route(points, route.tip, route.label)


def _direct(nodes: Mapping[str, Point], arrow: Direct) -> Route:
    """One curve, level where it starts and where it ends."""
    (x, y), (u, v) = nodes[arrow.source], nodes[arrow.target]
    forwards = 1 if u >= x else -1
    x, u = x + forwards * arrow.source_size.width / 2, u - forwards * (arrow.target_size.width / 2 + _HEAD)
    reach = max(abs(u - x) / 3, 2 * _HEAD) * forwards
    return Route(((x, y), (x + reach, y), (u - reach, v), (u, v)), (u + forwards * _HEAD, v), None)


def _framed(
    nodes: Mapping[str, Point],
    boxes: Mapping[str, tuple[float, float, float, float]],
    routes: Sequence[Route],
    frame: tuple[float, float, float, float],
) -> Layout:
    """Moved to the origin, the frame widened so that also arrows of which no engine knew are inside."""
    xs, ys = [frame[0], frame[2]], [frame[1], frame[3]]
    for route in routes:
        for i in range(0, len(route.points) - 3, 3):
            for t in (k / 8 for k in range(9)):
                x, y = _on_curve(route.points[i : i + 4], t)
                xs.append(x)
                ys.append(y)
    left, top = min(xs), min(ys)

    def moved(point: Point | None) -> Any:
        return None if point is None else (point[0] - left, point[1] - top)

    return Layout(
        max(xs) - left,
        max(ys) - top,
        {key: moved(p) for key, p in nodes.items()},
        {k: ((*moved((x, y)), *moved((right, bottom))),) for k, (x, y, right, bottom) in boxes.items()},
        tuple(Route(tuple(map(moved, e.points)), moved(e.tip), moved(e.label)) for e in routes),
    )


def _on_curve(points: Sequence[Point], t: float) -> Point:
    """The point of a cubic Bézier curve at a parameter."""
    weights = (1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3
    x, y = (sum(w * p[axis] for w, p in zip(weights, points, strict=True)) for axis in (0, 1))
    return x, y


def _route(item: dict[str, Any], height: float) -> Route:
    tip, points = None, []
    for part in item["pos"].split():
        if part.startswith(("e,", "s,")):
            x, y = _numbers(part[2:])
            tip = (x, height - y) if part.startswith("e,") else tip
        else:
            x, y = _numbers(part)
            points.append((x, height - y))
    label = None
    if "lp" in item:
        x, y = _numbers(item["lp"])
        label = x, height - y
    return Route(tuple(points), tip, label)


def _numbers(text: str) -> Sequence[float]:
    return [float(part) for part in text.split(",")]
