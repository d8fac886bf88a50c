"""What the commands print: text that is aligned without control characters, or one JSON object."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import typer

from funcprop.cli.errors import TargetError
from funcprop.graph.graph import aligned
from funcprop.sweeps.nonfinite import NonFinite


class Output(NamedTuple):
    """A result in two forms: text for people, data for programs.

    `content` is what the file of `--out` gets, and `text` then what is said of it, after its name.
    """

    text: str
    data: dict[str, Any]
    content: str | bytes | None = None


def emit(compute: Callable[[], Output], as_json: bool, out: Path | None = None) -> None:
    """Write the file, if there is one, and print the result on stdout.

    A `TargetError` goes to stderr, with exit code 1.
    A file that cannot be written is an error before anything is computed. Where it is one only afterwards,
    the content is written elsewhere and the result is printed all the same. With JSON, whatever the user's
    code prints goes to stderr, so that stdout is the one object.
    """
    redirected = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
    try:
        with redirected:
            if out is not None:
                require_writable(out)
            output = compute()
            jax.effects_barrier()
    except TargetError as error:
        print(f"funcprop: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    text, data, problem = output.text, output.data, None
    if out is not None and output.content is not None:
        path, problem = _written(out, output.content)
        text = f"{path}: {text}" if path is not None else str(output.content)
        if "out" in data:
            data = data | {"out": None if path is None else str(path)}
    try:
        print(json_text(data) if as_json else text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        # What is buffered could not be written at the end either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        problem = f"the result cannot be printed: {error.strerror}; write it elsewhere."
    if problem is not None:
        print(f"funcprop: {problem}", file=sys.stderr)
        raise typer.Exit(1)


def require_writable(path: Path) -> None:
    """Find out by opening it whether a file can be written; it is not changed.

    Raises:
        TargetError: it cannot.
    """
    try:
        existed = path.exists()
        if existed and not path.is_file() and not path.is_dir():
            return  # A pipe would be closed before it is used.
        path.open("ab").close()
        if not existed:
            path.unlink()
    except OSError as error:
        raise TargetError(
            f"--out {str(path)!r} cannot be written: {error.strerror}. Nothing has been computed yet; choose "
            "another file."
        ) from None


def _written(path: Path, content: str | bytes) -> tuple[Path | None, str | None]:
    """Write a file, or another one in its place; where it is, and what the matter was."""
    encoded = content.encode() if isinstance(content, str) else content
    try:
        path.write_bytes(encoded)
    except OSError as error:
        problem = f"--out {str(path)!r} cannot be written: {error.strerror}"
        try:
            with tempfile.NamedTemporaryFile(prefix="funcprop-", suffix=path.suffix, delete=False) as instead:
                instead.write(encoded)
        except OSError as second:
            return None, f"{problem}; nor can a temporary file: {second.strerror}; its content is on stdout."
        return Path(instead.name), f"{problem}; it was saved as {instead.name!r} instead."
    return path, None


def json_text(data: Any, indent: int | None = None) -> str:
    """Plain data as JSON, on stdout or in a file: what JSON has no number for is a string there."""
    return json.dumps(_for_json(data), allow_nan=False, indent=indent)


def _for_json(data: Any) -> Any:
    """Plain data with names for the numbers that JSON has not."""
    if isinstance(data, dict):
        return {key: _for_json(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_for_json(value) for value in data]
    return number(data)


# --- text -------------------------------------------------------------------------------------


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Aligned columns under the first row; the columns in `right` are flush right.

    Long cells end with `…`; in the JSON nothing is left out.
    """
    return aligned(rows, set(right))


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
