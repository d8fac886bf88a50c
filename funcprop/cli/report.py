"""`funcprop report TARGET`: one HTML page with everything there is to see."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np
import typer

import funcprop as fp
from funcprop.cli.errors import TargetError, users_code
from funcprop.cli.options import ArgnumsOrAll, AsJson, HasAux, TargetName, parse_argnums
from funcprop.cli.output import Output, digits, emit
from funcprop.cli.target import Target, as_setup, load
from funcprop.drawing.layout import find_engine
from funcprop.progress import bar
from funcprop.reporting.report import renderer
from funcprop.training.loop import Setup


def report(
    target: TargetName,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="file to write; the function's name if not given")
    ] = None,
    argnums: ArgnumsOrAll = "0",
    epochs: Annotated[int, typer.Option(min=1, help="of the training run that setup() describes")] = 10,
    examples: Annotated[
        bool, typer.Option("--examples", help="embed the entries of data and labels, not only statistics")
    ] = False,
    depth: Annotated[
        int | None, typer.Option(min=0, help="collapse scopes that have this many around them; 0 for all")
    ] = None,
    has_aux: HasAux = False,
    as_json: AsJson = False,
) -> None:
    """A page to open in a browser: the graph, both sweeps step by step, equations, memory, cost, training."""
    options = {"epochs": epochs, "examples": examples, "depth": depth, "has_aux": has_aux}
    path = out or Path(f"{re.sub(r'[^A-Za-z0-9]+', '_', target.rpartition(':')[2])}.html")

    def compute() -> Output:
        if path.suffix not in (".html", ".htm"):
            raise TargetError(f"--out {str(path)!r}: the page is .html; for a picture alone, funcprop draw.")
        return write(target, parse_argnums(argnums), options)

    emit(compute, as_json, path)


def write(target: str, argnums: Sequence[int] | None, options: dict[str, Any]) -> Output:
    """Gather, write the page, and say what is on it."""
    try:
        # What would be missed in the end is looked for first.
        renderer()
        find_engine(None)
    except (fp.ReportError, fp.DrawingError) as error:
        raise TargetError(str(error)) from None
    found, setup = _on_digits() if target == "chapter" else _users(load(target))
    with bar(target, counted=False) as update:
        with users_code(f"target {target!r}: the report failed", found.module):

            def progress(part: str) -> None:
                update(description=f"{target}: {part}")

            of = fp.report(found.function, argnums, title=target, setup=setup, progress=progress, **options)
            page = of(*found.args, **found.kwargs)
        try:
            text = page.html
        except (fp.ReportError, fp.DrawingError) as error:
            raise TargetError(str(error)) from None
    size = len(text.encode())
    value = "" if page.value is None else f"J = {digits(page.value)}, "
    line = f"{value}{len(page.graph)} operators, {size / 1e6:.1f} MB. Open it in a browser."
    return Output(
        line, {"target": target, "out": None, "bytes": size, "value": page.value, **page.as_dict()}, text
    )


def _users(target: Target) -> tuple[Target, Setup | None]:
    """The target with the training run that its module's `setup()` describes, if there is one."""
    setup = getattr(target.module, "setup", None)
    if not callable(setup):
        return target, None
    with users_code(f"target {target.label!r}: setup() of its module failed", target.module):
        given = setup()
    return target, as_setup(f"{target.label.rpartition(':')[0]}:setup", given)


def _on_digits() -> tuple[Target, Setup]:
    """The chapter's model for the first of scikit-learn's digits, and its training on all of them."""
    with users_code("target 'chapter': the training cannot be set up", None):
        split = fp.training.digits()
        setup = fp.training.chapter(split)
    image, label = jnp.asarray(split.train.images[0]), jnp.asarray(split.train.labels[0])
    found = load("chapter")
    return replace(found, args=(setup.params, image, label, jnp.asarray(np.float32(1e-4)))), setup
