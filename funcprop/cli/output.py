"""What the commands print: text that is aligned without control characters, or one JSON object."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import typer

from funcprop import NonFinite
from funcprop.cli.target import TargetError

WIDEST = 110  # characters in a cell of a table


class Output(NamedTuple):
    """The same result for people and for programs."""

    text: str
    data: dict[str, Any]


def emit(compute: Callable[[], Output], as_json: bool) -> None:
    """Print the result on stdout; a `TargetError` on stderr, with exit code 1.

    With JSON, whatever the user's code prints goes to stderr, so that stdout is the one object.
    """
    redirected = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
    try:
        with redirected:
            output = compute()
            jax.effects_barrier()
    except TargetError as error:
        print(f"funcprop: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    if as_json:
        print(json.dumps(output.data, allow_nan=False))
    else:
        print(output.text)


@contextlib.contextmanager
def written(path: Path) -> Iterator[None]:
    """Around the writing of what `--out` names.

    Raises:
        TargetError: the file cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise TargetError(f"--out {str(path)!r} cannot be written: {error.strerror}.") from None


# --- text -------------------------------------------------------------------------------------


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Aligned columns under the first row; the columns in `right` are flush right.

    Long cells end with `…`; in the JSON nothing is left out.
    """
    rows = [[cell if len(cell) <= WIDEST else cell[: WIDEST - 1] + "…" for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [rows[0], rule, *rows[1:]]
    )


def dimensions(shape: Sequence[int]) -> str:
    """A shape as the chapter writes it: `3 × 4`, or `scalar`."""
    return " × ".join(map(str, shape)) or "scalar"


def digits(number: Any) -> str:
    """Five significant digits; `NaN` and the like as they are, `-` for none."""
    return f"{number:.5g}" if isinstance(number, int | float) else str(number or "-")


def entries(value: Any) -> str:
    """All entries of an array on one line."""
    if not is_numeric(value):
        return "-"
    array = np.asarray(value)
    if jnp.issubdtype(array.dtype, jnp.floating):
        array = array.astype(np.float64)
    return np.array2string(array, precision=4, separator=" ", max_line_width=sys.maxsize).replace("\n", "")


# --- numbers for programs ---------------------------------------------------------------------


def describe(value: Any, limit: int | None) -> dict[str, Any]:
    """Shape, dtype, norm, range and entries of an array.

    JSON has no NaN or infinity: they are the strings "NaN", "Infinity", "-Infinity". Complex numbers are
    `{"real": …, "imag": …}`. `entries` is null for an array larger than `limit`, or without numbers (a key).
    """
    aval = jax.typeof(value)
    found: dict[str, Any] = {"shape": list(aval.shape), "dtype": str(aval.dtype)}
    found.update(dict.fromkeys(["norm", "min", "max", "nonfinite", "entries"]))
    if not is_numeric(value):
        return found
    array = np.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.complexfloating):
        exact = array if array.dtype.kind in "iub" else array.astype(np.float64)
        if exact.size:
            found.update({"min": number(exact.min()), "max": number(exact.max())})
    else:
        exact = array
    found["norm"] = number(np.linalg.norm(exact.ravel().astype(np.result_type(exact, np.float64))))
    found["nonfinite"] = int(np.size(exact) - np.count_nonzero(np.isfinite(exact)))
    if limit is None or exact.size <= limit:
        found["entries"] = _nested(exact)
    return found


def is_numeric(value: Any) -> bool:
    """Whether a value is an array of numbers, not of PRNG keys."""
    return not jnp.issubdtype(jax.typeof(value).dtype, jax.dtypes.extended)


def number(value: Any) -> Any:
    """A Python number, or its name where JSON has none."""
    plain = value.item() if hasattr(value, "item") else value
    if isinstance(plain, float) and not math.isfinite(plain):
        return "NaN" if math.isnan(plain) else ("Infinity" if plain > 0 else "-Infinity")
    return plain


def _nested(array: np.ndarray) -> Any:
    if np.iscomplexobj(array):
        return {"real": _nested(array.real), "imag": _nested(array.imag)}
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        return [_nested(row) for row in array] if array.ndim else number(array)
    return array.tolist()


def nonfinite_data(found: NonFinite | None) -> dict[str, Any] | None:
    """`first_nonfinite()` as plain data."""
    if found is None:
        return None
    return {
        "sweep": found.sweep,
        "variable": found.name,
        "operator": found.operator,
        "scope": found.scope,
        "source": found.source,
        "iteration": list(found.iteration),
        "index": list(found.index),
        "count": found.count,
        "text": str(found),
    }
