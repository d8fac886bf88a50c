"""`fp.animate(fun)(*args)`: both sweeps, step by step, with the numbers of a small model."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from funcprop.drawing.draw import Drawing, draw
from funcprop.drawing.figure import PaintedFigure
from funcprop.drawing.layout import DrawingError, Layout
from funcprop.drawing.picture import Picture
from funcprop.drawing.svg import clean, svg
from funcprop.graph.graph import Graph
from funcprop.graph.objective import Argnums
from funcprop.graph.writable import require_writable
from funcprop.rules.rule_set import RuleSet
from funcprop.sweeps.backprop import propagation_of
from funcprop.sweeps.propagation import Propagation

# Every step is a picture of its own.
MOST_OPERATORS = 60
_SUFFIXES = (".gif", ".svg", ".html")
_CAPTION = 34.0


class Frame(NamedTuple):
    """A moment: what is computed so far, in which sweep, by the keys of nodes; and the step in words."""

    caption: str
    forward: frozenset[str]
    backward: frozenset[str]
    now: frozenset[str]


@dataclass(frozen=True)
class Animation:
    """Both sweeps as frames: `.save("x.gif")`, `.save("x.svg")` or `.save("x.html")`; a notebook plays it.

    `seconds` is how long a step is seen.
    """

    drawing: Drawing = field(repr=False)
    propagation: Propagation = field(repr=False)
    seconds: float = 1.2

    def __len__(self) -> int:
        return len(self.frames)

    @cached_property
    def frames(self) -> tuple[Frame, ...]:
        """All steps, beginning with nothing."""
        shown = self.drawing.shown
        graph = self.propagation.graph if shown is None else shown.graph
        return tuple(_frames(graph, self.propagation, self.drawing.picture))

    @cached_property
    def layout(self) -> Layout:
        """Where everything stands, the same in all frames, with room for all numbers."""
        return replace(self.drawing, picture=self._picture(self.frames[-1], everything=True)).layout

    def _picture(self, frame: Frame, everything: bool = False) -> Picture:
        nodes = []
        for node in self.drawing.picture.nodes:
            is_back = node.key in frame.backward
            role = "backward" if is_back else "forward" if node.key in frame.forward else "waiting"
            value, gradient = self._numbers(node.name) if node.kind == "variable" else ("", "")
            seen = [value] if everything or role != "waiting" else []
            seen += [gradient] if everything or is_back else []
            brief, reserved = ("\n".join(filter(None, lines)) for lines in (seen, (value, gradient)))
            nodes.append(replace(node, role=role, brief=brief, details="", reserved=reserved))
        return replace(self.drawing.picture, nodes=tuple(nodes), legend=())

    def _numbers(self, name: str) -> tuple[str, str]:
        values, gradients = self.propagation.values, self.propagation.gradients
        value = numbers(values[name]) if name in values else ""
        return value, f"∂ {numbers(gradients[name])}" if name in gradients else ""

    def svg(self) -> str:
        """An SVG that plays by itself, in browsers and slides, again and again."""
        total = len(self) * self.seconds
        groups = []
        width = height = 0.0
        for i, frame in enumerate(self.frames):
            text = svg(self._picture(frame), self.layout, False, "light")
            root, body = text.split(">", 1)
            width, height = (float(root.split(f'{side}="')[1].split('"')[0]) for side in ("width", "height"))
            body = body.rsplit("</svg>", 1)[0]
            times = [(0.0, "hidden")] * (i > 0) + [(i / len(self), "visible")]
            times += [((i + 1) / len(self), "hidden")] * (i + 1 < len(self))
            keys, values = ";".join(f"{t:.5f}" for t, _ in times), ";".join(v for _, v in times)
            groups.append(
                f'<g visibility="{"visible" if i == 0 else "hidden"}"><animate attributeName="visibility" '
                f'calcMode="discrete" dur="{total:g}s" repeatCount="indefinite" keyTimes="{keys}" '
                f'values="{values}"/>{body}<text x="12" y="{height + 20:.0f}" font-size="13" '
                f'text-anchor="start">{clean(frame.caption)}</text></g>'
            )
        tall = height + _CAPTION
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{tall:.0f}" viewBox="0 0 '
            f'{width:.2f} {tall:.2f}" role="img" font-family="Helvetica, Arial, sans-serif" '
            'text-anchor="middle">'
            f'<rect width="{width:.2f}" height="{tall:.2f}" fill="#ffffff"/>' + "\n".join(groups) + "</svg>"
        )

    def html(self) -> str:
        """A page that plays it; it loads nothing."""
        title = escape(self.drawing.picture.title)
        return (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f'<link rel="icon" href="data:,"></head><body style="margin:0">{self.svg()}</body></html>\n'
        )

    def gif(self) -> bytes:
        """A GIF for slides, again and again.

        Raises:
            DrawingError: matplotlib and Pillow, which draw it, are not installed.
        """
        figures = [
            PaintedFigure(self._picture(frame), self.layout, False, below=_CAPTION) for frame in self.frames
        ]
        from PIL import Image

        images = []
        for frame, painted in zip(self.frames, figures, strict=True):
            painted.text(0, painted.height - 30, frame.caption, 13, "#1b2733", ha="left")
            file = io.BytesIO()
            painted.figure.savefig(file, format="png", dpi=100)
            images.append(Image.open(file).convert("P", palette=Image.Palette.ADAPTIVE))
        file = io.BytesIO()
        duration = int(1000 * self.seconds)
        images[0].save(file, "GIF", save_all=True, append_images=images[1:], loop=0, duration=duration)
        return file.getvalue()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file; its suffix, one of .gif .svg .html, says what.

        Raises:
            DrawingError: the suffix is another, or the directory is not there.
        """
        try:
            require_writable("fp.animate: path", path, _SUFFIXES)
        except OSError as error:
            raise DrawingError(str(error)) from None
        written = getattr(self, Path(path).suffix[1:])()
        Path(path).write_bytes(written if isinstance(written, bytes) else written.encode())

    def _repr_html_(self) -> str:
        return f'<div style="overflow:auto">{self.svg()}</div>'


def animate(
    fun: Callable[..., Any],
    argnums: Argnums = 0,
    has_aux: bool = False,
    *,
    rules: RuleSet | None = None,
    seconds: float = 1.2,
) -> Callable[..., Animation]:
    """Show both sweeps of a scalar function step by step: `animate(fun)(*args, **kwargs) -> Animation`.

    The forward sweep computes one operator after another, and its values appear in their squares; then the
    backward sweep goes the way back, and beneath the values appear the gradients: up to four numbers, or the
    norm.

    Args:
        fun: returns a real scalar.
        argnums, has_aux, rules: as in `fp.backprop`.
        seconds: how long a step is seen.

    Raises:
        ValueError: the function has more than 60 operators, of which nothing could be seen.
        TypeError: as in `fp.backprop`.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> movie = fp.animate(lambda w, x: fp.name(fp.name(w * x, "z") ** 2, "L"))(3.0, 2.0)
        >>> [frame.caption for frame in movie.frames][-1]
        'backward 2 of 2: ∂L/∂w = 24'
    """

    def animated(*args: Any, **kwargs: Any) -> Animation:
        propagation = propagation_of(fun, argnums, has_aux, rules=rules)(*args, **kwargs)
        graph = propagation.graph
        if len(graph) > MOST_OPERATORS:
            raise ValueError(
                f"fp.animate: {graph.name} has {len(graph)} operators, too many to be seen; animate a "
                f"function of up to {MOST_OPERATORS}, or use fp.report, which plays the sweeps of any."
            )
        drawing = draw(graph, depth=MOST_OPERATORS, fold=False, loops=0, dead=True)
        return Animation(drawing, propagation, seconds)

    return animated


def numbers(value: Any) -> str:
    """Up to four numbers, or the norm of more."""
    array = np.asarray(value)
    if not np.issubdtype(array.dtype, np.number) and array.dtype != bool:
        return str(array.dtype)
    if array.size > 4:
        return f"‖·‖ = {np.linalg.norm(array.astype(np.float64).ravel()):.3g}"
    written = [f"{x:.3g}".replace("-", "−") for x in array.ravel().astype(np.float64)]
    return written[0] if array.ndim == 0 else f"[{', '.join(written)}]"


def _equation(name: str, value: Any) -> str:
    written = numbers(value)
    return f"{name} = {written}" if "‖" not in written else written.replace("‖·‖", f"‖{name}‖")


def _frames(graph: Graph, propagation: Propagation, picture: Picture) -> Iterator[Frame]:
    """Nothing, every operator forward, and backward every operator that sends a gradient on."""
    result = graph.outputs[0].name
    given = {f"v:{v.name}" for v in (*graph.inputs, *graph.constants)}
    forward, backward = set(given), set[str]()
    yield Frame("The arguments are given.", frozenset(forward), frozenset(), frozenset())
    for i, op in enumerate(graph.operators):
        new = {f"o:{op.name}", *(f"v:{v.name}" for v in op.outputs)}
        forward |= new
        out = ", ".join(_equation(v.name, propagation.values[v.name]) for v in op.outputs[:1])
        caption = f"forward {i + 1} of {len(graph)}: {out}"
        yield Frame(caption, frozenset(forward), frozenset(), frozenset(new))
    have = set(propagation.gradients) | {result}
    senders = [
        (op, [v.name for v in op.inputs if v.kind != "literal" and v.name in have])
        for op in reversed(graph.operators)
        if any(v.name in have for v in op.outputs)
    ]
    senders = [(op, list(dict.fromkeys(names))) for op, names in senders if names]
    last = {name: op.name for op, names in senders for name in names}
    backward.add(f"v:{result}")
    for i, (op, names) in enumerate(senders):
        done = [name for name in names if last[name] == op.name]
        new = {f"o:{op.name}", *(f"v:{name}" for name in done)}
        backward |= new
        said = [_equation(f"∂{result}/∂{name}", propagation.gradients[name]) for name in done]
        said = said or [f"a contribution to ∂{result}/∂{', '.join(names)}"]
        caption = f"backward {i + 1} of {len(senders)}: {', '.join(said)}"
        yield Frame(caption, frozenset(forward), frozenset(backward), frozenset(new))
