"""Picking entries: their cotangents go back to where they came from.

    gather       y[i] = x[index(i)]            x̄[j] = Σ {ȳ[i] : index(i) = j}
    scatter_add  y = x with u[i] added at j(i)  x̄ = ȳ,  ū[i] = ȳ[j(i)]
    top_k        y[k] = x[index(k)]             x̄[index(k)] = ȳ[k]

An embedding is a gather of a table's rows, and its gradient a scatter of the rows' cotangents. All three save
the indices alone. XLA's CPU backend scatters rows at the speed of memory (2048 rows of 256 into a table of
32,000: 1.0 ms; as a product with one-hot rows: 207 ms), and autodiff does just this, so the rules
win nothing and are in no default set.

Source: Griewank and Walther, *Evaluating Derivatives*, section 3.2, for the adjoint of a selection.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from funcprop.rules.equations import Equations, OperatorSymbols, apply, indexed, written
from funcprop.rules.expressions import Expression
from funcprop.rules.rule import Rule
from funcprop.rules.rule_set import OperatorKey


class Places(NamedTuple):
    """The indices; the table is there for its type alone."""

    x: Any
    indices: Any


def _gather_forward(x: Any, indices: Any, **static: Any) -> tuple[Any, Places]:
    return lax.gather(x, indices, **static), Places(x, indices)


def _gather_backward(residuals: Places, g: Any, needs: Any, **static: Any) -> tuple[Any, None]:
    x, indices = residuals
    return jax.linear_transpose(lambda x: lax.gather(x, indices, **static), x)(g)[0], None


def _added(x: Any, indices: Any, updates: Any, **static: Any) -> Any:
    parameters = {k: v for k, v in static.items() if not k.startswith("update_")}
    return lax.scatter_add(x, indices, updates, **parameters)


class PlacesOfUpdates(NamedTuple):
    """The indices; operand and updates are there for their types alone."""

    x: Any
    indices: Any
    updates: Any


def _scatter_forward(x: Any, indices: Any, updates: Any, **static: Any) -> tuple[Any, PlacesOfUpdates]:
    return _added(x, indices, updates, **static), PlacesOfUpdates(x, indices, updates)


def _scatter_backward(residuals: PlacesOfUpdates, g: Any, needs: Any, **static: Any) -> tuple[Any, None, Any]:
    x, indices, updates = residuals
    put = lambda x, u: _added(x, indices, u, **static)  # noqa: E731
    x_cotangent, updates_cotangent = jax.linear_transpose(put, x, updates)(g)
    return x_cotangent, None, updates_cotangent


def _top_k_forward(x: Any, *, axis: int, **static: Any) -> tuple[Any, Places]:
    values, indices = lax.top_k(x, static["k"], axis=axis)
    return [values, indices], Places(x, indices)


def _top_k_backward(residuals: Places, cotangents: Any, needs: Any, *, axis: int, **_: Any) -> tuple[Any]:
    x, indices = residuals
    pick = lambda x: jnp.take_along_axis(x, indices, axis)  # noqa: E731
    return jax.linear_transpose(pick, x)(cotangents[0])


def _gather_equations(op: OperatorSymbols) -> Equations:
    x, indices = op.args
    static = dict(op.static)

    def back(g: Any, indices: Any) -> Any:
        return _gather_backward(Places(jnp.zeros(x.shape, x.type.dtype), indices), g, None, **static)[0]

    def rows(x: Any, i: Any) -> Any:
        return lax.gather(x, i, **static)

    numbers = static["dimension_numbers"]
    axis = numbers.start_index_map[0] if len(numbers.start_index_map) == 1 else -1
    # `x[:, i]`: whole ranges along all axes but one, in whose place the axes of the indices stand.
    sizes = (*x.shape[:axis], 1, *x.shape[axis + 1 :])
    new = len(indices.shape) - 1
    kept = tuple(k if k < axis else k + new for k in range(len(x.shape) - 1))
    is_along_axis = numbers.collapsed_slice_dims == (axis,) and tuple(static["slice_sizes"]) == sizes
    if is_along_axis and numbers.offset_dims == kept:
        forward = indexed(rows, x, indices, op.output.type, axis)
    elif (places := _places(x, indices, numbers)) is not None and (
        before := _whole_axes_before(x, indices, static)
    ) is not None:
        where, operands, whole = places
        where = ":, " * before + where
        forward = written(
            lambda x, *parts: rows(x, whole(*parts)),
            (x, *operands),
            f"{{0}}[{where}]",
            f"{{0}}\\left[{where}\\right]",
            op.output.type,
        )
        backward = written(
            lambda g, *parts: back(g, whole(*parts)),
            (op.cotangent, *operands),
            f"scatter({{0}}, [{where}])",
            f"\\mathrm{{{{scatter}}}}\\!\\left({{0}}, \\left[{where}\\right]\\right)",
            x.type,
        )
        return Equations(forward, (backward, None))
    else:
        forward = apply("gather", rows, x, indices)
    return Equations(forward, (apply("scatter", back, op.cotangent, indices), None))


def _whole_axes_before(x: Expression, indices: Expression, static: dict[str, Any]) -> int | None:
    """How many axes stand before those of single places, if all that is along the others is taken."""
    numbers, sizes = static["dimension_numbers"], tuple(static["slice_sizes"])
    if all(n == 1 for n in sizes):
        return 0
    first, new = min(numbers.start_index_map), len(indices.shape) - 1
    end = first + len(numbers.start_index_map)
    is_whole = (
        numbers.start_index_map == numbers.collapsed_slice_dims == tuple(range(first, end))
        and (*sizes[:first], *sizes[end:]) == (*x.shape[:first], *x.shape[end:])
        and numbers.offset_dims == (*range(first), *range(first + new, new + len(x.shape) - end + first))
    )
    return first if is_whole else None


def _places(
    x: Expression, indices: Expression, numbers: Any
) -> tuple[str, tuple[Expression, ...], Callable[..., Any]] | None:
    """How single entries are named, `i, j`: a template, its operands after the first, and their function."""
    if indices.template.startswith("concat("):
        inside = ", ".join(f"{{{i}}}" for i in range(1, len(indices.operands) + 1))
        return inside, indices.operands, indices.function
    if not numbers.operand_batching_dims:
        return None
    # One entry of each row.
    rows = f"arange({x.shape[0]})" if numbers.operand_batching_dims == (0,) and len(x.shape) == 2 else "…"
    return f"{rows}, {{1}}", (indices,), lambda i: i


def _put_equations(op: OperatorSymbols) -> Equations | None:
    """An array with other entries at some places."""
    x, indices, updates = op.args
    static = dict(op.static)
    places = _places(x, indices, static["dimension_numbers"])
    if places is None or updates.constant is None or static["dimension_numbers"].update_window_dims:
        return None
    where, operands, whole = places
    parameters = {k: v for k, v in static.items() if not k.startswith("update_")}

    def put(x: Any, *parts: Any) -> Any:
        value = jnp.full(updates.shape, updates.constant, x.dtype)
        return lax.scatter(x, whole(*parts), value, **parameters)

    def back(g: Any, *parts: Any) -> Any:
        return lax.scatter(g, whole(*parts), jnp.zeros(updates.shape, g.dtype), **parameters)

    def shown(function: Any, of: Expression, value: str) -> Expression:
        latex = f"{{0}}\\ \\text{{{{with}}}}\\ \\left[{where}\\right] = {value}"
        text = f"{{0}} with [{where}] = {value}"
        return written(function, (of, *operands), text, latex, of.type, is_sum=True)

    return Equations(shown(put, x, updates.text()), (shown(back, op.cotangent, "0"), None, None))


def _scatter_equations(op: OperatorSymbols) -> Equations:
    x, indices, updates = op.args
    static = dict(op.static)
    like = (jnp.zeros(x.shape, x.type.dtype), jnp.zeros(updates.shape, updates.type.dtype))

    def back(g: Any, indices: Any) -> Any:
        return _scatter_backward(PlacesOfUpdates(like[0], indices, like[1]), g, None, **static)[2]

    numbers = static["dimension_numbers"]
    if numbers.scatter_dims_to_operand_dims == numbers.inserted_window_dims == (0,) and x.constant == 0:
        # Rows are added up where their index is the same.
        text = "sum({1} by {0})"
        latex = "\\mathrm{{sum}}\\!\\left({1}\\ \\text{{by}}\\ {0}\\right)"
        rows = lambda i, u: _added(jnp.zeros(x.shape, x.type.dtype), i, u, **static)  # noqa: E731
        forward = written(rows, (indices, updates), text, latex, op.output.type)
        picked = indexed(back, op.cotangent, indices, updates.type)
        return Equations(forward, (op.cotangent, None, picked))
    forward = apply("scatter", lambda x, i, u: _added(x, i, u, **static), x, indices, updates)
    return Equations(forward, (op.cotangent, None, apply("gather", back, op.cotangent, indices)))


RULES: dict[OperatorKey, Rule] = {
    "gather": Rule(_gather_forward, _gather_backward, _gather_equations, platforms=frozenset(), pure=True),
    "scatter-add": Rule(
        _scatter_forward,
        _scatter_backward,
        _scatter_equations,
        platforms=frozenset(),
        applies=lambda x, i, u, **_: True if x.dtype == u.dtype else f"it adds {u.dtype} to {x.dtype}",
        pure=True,
    ),
    "top_k": Rule(_top_k_forward, _top_k_backward, platforms=frozenset(), pure=True),
}

EQUATIONS: dict[str, Callable[[OperatorSymbols], Equations | None]] = {"scatter": _put_equations}
