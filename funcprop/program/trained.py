"""What of a model is trained: floating-point arrays; of an nnx model the variables that are `nnx.Param`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from funcprop._jax import is_differentiable, nnx
from funcprop.program.call import pair


class Trained(NamedTuple):
    """A model in parts: `arrays` are trained, `state` (or None) is what the model itself changes.

    `joined(arrays, state)` is the model again, with what is fixed: functions, flags, sizes.
    """

    arrays: Any
    state: Any
    joined: Callable[[Any, Any], Any]

    @property
    def is_whole(self) -> bool:
        """Whether the arrays are the model itself."""
        return self.joined is _itself

    @classmethod
    def of(cls, model: Any) -> Trained:
        """Take a model apart, as `trained_leaves` says.

        Raises:
            TypeError: a parameter has no derivative.
            ValueError: there is nothing to train.
        """
        if nnx.has_models(model):
            arrays, state, joined = nnx.parted(model)
            if jax.tree.leaves(state):
                return cls(arrays, state, joined)
        marks = trained_leaves(model)
        if all(marks):
            _require_derivatives(model)
            return cls(model, None, _itself)
        leaves, tree = jax.tree.flatten(model)
        if not any(marks):
            kinds = ", ".join(sorted({type(leaf).__name__ for leaf in leaves}))
            raise ValueError(f"the parameters are of type {kinds}; give a tree of floating-point arrays.")
        pairs = list(zip(leaves, marks, strict=True))
        arrays = jax.tree.unflatten(tree, [x if mark else None for x, mark in pairs])
        fixed = jax.tree.unflatten(tree, [None if mark else x for x, mark in pairs])

        def filled(arrays: Any, _: Any) -> Any:
            return jax.tree.map(
                lambda f, x: x if f is None else f, fixed, arrays, is_leaf=lambda x: x is None
            )

        return cls(arrays, None, filled)

    @classmethod
    def stateless(cls, model: Any) -> Trained:
        """Take a model apart that changes nothing of itself, as `of`.

        Raises:
            TypeError: it is an nnx model with other variables than parameters.
        """
        found = cls.of(model)
        if found.state is not None:
            names = ", ".join(sorted({type(v).__name__ for v in nnx.variables(found.state)}))
            raise TypeError(
                f"params is an nnx model with {names} besides nnx.Param; split it (graph, params, state = "
                "nnx.split(model, nnx.Param, ...)), and give params, with a loss that merges them."
            )
        return found

    def function(self, fun: Callable[..., Any], has_aux: bool = False) -> Callable[..., Any]:
        """A function of the model as one of the arrays (and the state, which is returned besides)."""
        if self.is_whole:
            return fun

        @functools.wraps(fun, updated=())
        def of_arrays(arrays: Any, *rest: Any, **options: Any) -> Any:
            if self.state is None:
                return fun(self.joined(arrays, None), *rest, **options)
            model = self.joined(arrays, rest[0])
            result = fun(model, *rest[1:], **options)
            state = nnx.state_like(self.state, model)
            if not has_aux:
                return result, state
            value, aux = pair(result, fun)
            return value, (state, aux)

        if self.state is not None:
            of_arrays.__signature__ = _with_state(fun)  # type: ignore[attr-defined]
        return of_arrays

    def evaluation(self, fun: Callable[..., Any] | None) -> Callable[..., Any] | None:
        """A function that reads the model as one of the arrays (and the state)."""
        if fun is None or self.is_whole:
            return fun
        return lambda arrays, state=None: fun(self.joined(arrays, state))


def _with_state(fun: Callable[..., Any]) -> inspect.Signature:
    """The signature of a function of a model as one of arrays and state."""
    signature = inspect.signature(fun)
    first, *others = signature.parameters.values()
    if first.kind is first.VAR_POSITIONAL:
        return signature
    state = inspect.Parameter("model_state", first.kind)
    return signature.replace(parameters=[first, state, *others])


def trained_leaves(model: Any) -> tuple[bool, ...]:
    """For each leaf whether it is trained: of nnx models variables of type `nnx.Param`, of others arrays.

    In a tree that holds functions or flags, as modules of Equinox do, floating-point arrays are trained; in
    any other all leaves, so that a parameter of integers is an error of who differentiates it.
    """
    if nnx.has_models(model):
        return nnx.trained_leaves(model)
    leaves = jax.tree.leaves(model)
    if not any(callable(leaf) or isinstance(leaf, bool) for leaf in leaves):
        return (True,) * len(leaves)
    return tuple(map(is_differentiable, leaves))


def _require_derivatives(model: Any) -> None:
    for path, leaf in jax.tree.leaves_with_path(model):
        dtype = getattr(leaf, "dtype", None) or type(leaf)
        if not jnp.issubdtype(dtype, jnp.inexact):
            name = jax.tree_util.keystr(path, simple=True, separator="/") or "params"
            kind = dtype.__name__ if isinstance(dtype, type) else dtype
            raise TypeError(
                f"the parameter {name!r} is {kind}, which has no derivative; close over it, or make it an "
                "array of floating-point numbers."
            )


def _itself(arrays: Any, _: Any) -> Any:
    return arrays
