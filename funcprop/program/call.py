"""A call of a user's function as flat arrays in, flat arrays out, and its trace.

Some leaves of the arguments are variables (the arrays that are traced); all others, python numbers, strings
and objects, stay what they are.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from funcprop import _jax


@dataclass(frozen=True, eq=False)
class Call:
    """The leaves of `(args, kwargs)`, their structure, and the positions of those that are variables."""

    leaves: tuple[Any, ...]
    tree: Any
    variables: tuple[int, ...]

    @classmethod
    def of(cls, args: Any, kwargs: Mapping[str, Any], is_variable: Callable[[Any], bool]) -> Call:
        """Flatten the arguments of a call.

        Of an argument that holds functions, as modules of Equinox do, python floats are settings.
        """
        leaves, tree = jax.tree.flatten((tuple(args), dict(kwargs)))
        settings: set[int] = set()
        structure: Any = tree
        start = 0
        for argument in (child for whole in structure.children() for child in whole.children()):
            own = range(start, start := start + argument.num_leaves)
            if any(callable(leaves[i]) for i in own):
                settings |= {i for i in own if type(leaves[i]) is float}
        found = (i for i, leaf in enumerate(leaves) if i not in settings and is_variable(leaf))
        return cls(tuple(leaves), tree, tuple(found))

    @property
    def values(self) -> list[Any]:
        """The variables' own values."""
        return [self.leaves[i] for i in self.variables]

    def filled(self, values: Sequence[Any]) -> list[Any]:
        """All leaves, with other values for the variables."""
        leaves = list(self.leaves)
        for i, value in zip(self.variables, values, strict=True):
            leaves[i] = value
        return leaves

    def arguments(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """`args` and `kwargs` again, in new containers."""
        return jax.tree.unflatten(self.tree, leaves)


def name_of(fun: Any, unnamed: str | None = None) -> str:
    """The name of a function, also of one with some arguments bound; its type's if it has none."""
    if isinstance(fun, functools.partial):
        return name_of(fun.func, unnamed)
    return str(getattr(fun, "__name__", unnamed or type(fun).__name__))


class _Bare(str):
    """Text that a container shows without quotes."""

    __repr__ = str.__str__


def shown_types(tree: Any) -> str:
    """A pytree of arrays or of their types, as `{'a': float32[3]}`."""
    return str(jax.tree.map(lambda leaf: _Bare(f"{leaf.dtype}{list(leaf.shape)}"), tree))


def pair(returned: Any, fun: Callable[..., Any]) -> tuple[Any, Any]:
    """Check the result of a function with auxiliary data: a pair.

    Raises:
        TypeError: it is no pair.
    """
    if not (isinstance(returned, tuple | list) and len(returned) == 2):
        raise TypeError(
            f"has_aux=True, but {getattr(fun, '__name__', fun)!s} returns {type(returned).__name__}; "
            "return the pair (result, auxiliary data)."
        )
    return returned[0], returned[1]


def without_aux(fun: Callable[..., Any]) -> Callable[..., Any]:
    """The first of the two results of a function; errors as in `pair`."""

    @functools.wraps(fun)
    def result(*args: Any, **kwargs: Any) -> Any:
        return pair(fun(*args, **kwargs), fun)[0]

    result.__name__ = getattr(fun, "__name__", type(fun).__name__)
    return result


def succeeds(fun: Callable[..., Any], *args: Any) -> bool:
    """Whether a call can be traced; for messages about another one that cannot."""
    try:
        jax.eval_shape(fun, *args)
    except Exception:
        return False
    return True


@contextlib.contextmanager
def in_order(
    model: Callable[..., Any], loss: Callable[..., Any], params: Any, x: Any, y: Any
) -> Iterator[None]:
    """Turn a failure that swapped `model` and `loss` cause into a clear TypeError; a context manager.

    Raises:
        TypeError: they are; whatever was raised otherwise.
    """
    try:
        yield
    except Exception as error:
        if succeeds(lambda params, x, y: loss(model(params, x), y), params, x, y):
            raise
        if not succeeds(lambda params, x, y: model(loss(params, x), y), params, x, y):
            raise
        first, second = (getattr(f, "__name__", f) for f in (model, loss))
        raise TypeError(
            f"model={first} and loss={second} are in the wrong order: {first}({second}(params, x), y) can be "
            f"called, {second}({first}(params, x), y) cannot; pass the model first."
        ) from error


def require_callable(fun: Any) -> None:
    """Raise unless `fun` is callable.

    Raises:
        TypeError: with the value.
    """
    if not callable(fun):
        raise TypeError(
            f"fun={_brief(fun)} is {type(fun).__name__}, not a function; pass the function first and its "
            "arguments in a second call, as in fp.grad(loss)(params, x, y)."
        )


def _brief(value: Any) -> str:
    """A value on one line: an array by its type."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    return repr(value).splitlines()[0]


def require_optimizer(of: str, optimizer: Any) -> None:
    """Raise a TypeError, which begins with `of`, unless an optimizer has an `init` and an `update`."""
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        shown = repr(optimizer) if isinstance(optimizer, str) else f"of type {type(optimizer).__name__}"
        raise TypeError(f"{of}optimizer is {shown}; pass an optax optimizer, such as optax.adam(1e-3).")


def update_by(optimizer: optax.GradientTransformation) -> Callable[..., tuple[Any, Any]]:
    """Make `update(gradient, state, params, value, loss, batch) -> (updates, state)` of an optimizer.

    It is given what it has use for besides the gradient: `value`, `grad`, `batch`, and as `value_fn` the
    `loss(params, batch)`, of this batch if none is given.
    """
    require_optimizer("", optimizer)
    if isinstance(optimizer, optax.MultiSteps):  # It hands extra arguments on, but its type does not say so.
        optimizer = optax.GradientTransformationExtraArgs(optimizer.init, optimizer.update)
    transformation = optax.with_extra_args_support(optimizer)

    def update(
        gradient: Any, state: Any, params: Any, value: Any, loss: Callable[..., Any], batch: Any
    ) -> tuple[Any, Any]:
        def value_fn(params: Any, batch: Any = batch) -> Any:
            return loss(params, batch)

        extra = {"value": value, "grad": gradient, "value_fn": value_fn, "batch": batch}
        return transformation.update(gradient, state, params, **extra)

    return update


def all_finite(tree: Any) -> Any:
    """Return whether all entries of all floating arrays are finite."""
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in leaves])) if leaves else jnp.bool_(True)


def has_values(tree: Any) -> bool:
    """Whether no leaf is a shape (`jax.ShapeDtypeStruct`), which can only be traced."""
    return not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))


def require_values(what: str, tree: Any, instead: str) -> None:
    """Raise if a leaf is only a shape: `what` needs values, `instead` takes shapes.

    Raises:
        TypeError: with the path of the first shape.
    """
    for path, leaf in jax.tree.leaves_with_path(tree):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            raise TypeError(
                f"{where} is a shape (jax.ShapeDtypeStruct, {leaf.dtype}{list(leaf.shape)}), but {what} "
                f"needs values; pass arrays, or ask {instead} about shapes."
            )


def is_array(leaf: Any) -> bool:
    """Whether a leaf is a variable of a graph: an array, a shape, or a python float."""
    if isinstance(leaf, bool | int | str | bytes):
        return False
    return isinstance(leaf, float | complex | np.generic | np.ndarray) or (
        hasattr(leaf, "shape") and hasattr(leaf, "dtype")
    )


def traced(
    flat: Callable[..., Sequence[Any]],
    values: Sequence[Any],
    fun: Callable[..., Any],
    which: str = "an array argument",
) -> Any:
    """The jaxpr of `flat`, in which `fun` is called, at the types of `values`.

    `which` says for messages what the variables are.

    Tracing stages every operation, also those that no variable takes part in. Where `fun` needs the value of
    such an operation in python (`if flag > 0`), and its surroundings would have computed it, `fun` is
    called once more with these operations computed at once, as `jax.grad` computes them.

    Raises:
        TypeError: `fun` is no function.
        jax.errors.ConcretizationTypeError: `fun` needs the value of a variable in python.
    """
    require_callable(fun)
    try:
        return jax.make_jaxpr(flat)(*values)
    except _NEEDS_VALUE:
        with _explained(fun, which):
            if _is_staging():
                raise
            with jax.ensure_compile_time_eval():
                jaxpr = jax.make_jaxpr(flat)(*values)
            if _jax.closes_over_references(jaxpr):
                # Some of its uses of references were staged and others done at once: out of order.
                raise
            return jaxpr


_NEEDS_VALUE = (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError)


def _is_staging() -> bool:
    """Whether an operation on constants is staged here, as under `jit`, and not computed."""
    return isinstance(jax.lax.add(np.float32(0), np.float32(0)), jax.core.Tracer)


@contextlib.contextmanager
def _explained(fun: Callable[..., Any], which: str) -> Iterator[None]:
    note = (
        f"funcprop traces {getattr(fun, '__name__', fun)!s} as `jax.jit` would: python control flow on the "
        f"value of {which}, or of what is computed from it, needs `jax.lax.cond` or `jnp.where`, or has to "
        "be decided before the call."
    )
    try:
        yield
    except _NEEDS_VALUE as raised:
        raised.add_note(note)
        raise
