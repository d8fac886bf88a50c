"""A layer: a pure function that stays one operator of the graph."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cached_property, wraps
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np

from funcprop.program.layer_calls import LayerCall, boundary_p
from funcprop.rules.rule import Rule, RuleError


class Layer:
    """A pure function as one operator of the graph, with its rule and initialiser beside it.

    Positional arguments are arrays or pytrees of arrays; keyword-only arguments are static and hashable.
    Made by `fp.layer`; called like the function it wraps, under every JAX transformation.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        rule: Rule | None = None,
        init: Callable[..., Any] | None = None,
        symbol: str | Callable[..., str] | None = None,
    ) -> None:
        if rule is not None and not isinstance(rule, Rule):
            raise RuleError(f"fp.layer: rule={rule!r} is no rule; pass fp.Rule(forward, backward).")
        self.function = function
        self.name = getattr(function, "__name__", type(function).__name__)
        self.rule: Any = rule
        self.init: Any = init
        self.symbol: Any = symbol
        wraps(function)(self)

        def body(call: LayerCall, *leaves: Any) -> Any:
            results, tree = jax.tree.flatten(call.plain(*leaves))
            results = [x if isinstance(x, jax.Array) else jnp.asarray(x) for x in results]
            return jax.tree.unflatten(tree, boundary_p.bind(*leaves, *results, call=call))

        body.__name__ = body.__qualname__ = self.name
        self._jitted = jax.jit(body, static_argnums=0)

    @cached_property
    def signature(self) -> inspect.Signature:
        """The signature of the wrapped function."""
        return inspect.signature(self.function)

    @cached_property
    def positional_names(self) -> tuple[str, ...]:
        """The names of the array arguments."""
        kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
        return tuple(n for n, p in self.signature.parameters.items() if p.kind not in kinds)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped function's result; under tracing, one equation of the jaxpr."""
        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"layer {self.name}: {error}; its signature is {self._parameters()}.") from None
        bound.apply_defaults()
        leaves, tree = jax.tree.flatten(bound.args)
        call = LayerCall(self, tuple(sorted(bound.kwargs.items())), tree)
        for name, value in call.static:
            try:
                hash(value)
            except TypeError:
                raise TypeError(
                    f"layer {self.name}: static argument {name}={value!r} is not hashable; keyword-only "
                    f"arguments are static. Pass a tuple, or make {name} positional if it is an array."
                ) from None
        for leaf, name in zip(leaves, call.argument_names(), strict=True):
            if not isinstance(leaf, jax.Array | np.ndarray | np.generic | int | float | complex):
                raise TypeError(
                    f"layer {self.name}: argument {name}={leaf!r} is not an array; make the parameter "
                    "keyword-only (after `*`) so that it is static."
                )
        return self._jitted(call, *leaves)

    def _parameters(self) -> str:
        return (
            f"{self.name}({', '.join(str(p).partition(':')[0] for p in self.signature.parameters.values())})"
        )

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else _BoundLayer(self, instance)

    def __repr__(self) -> str:
        return f"<layer {self.name}>"


class _BoundLayer:
    """A layer that was defined in a class body, bound to its instance (a pytree)."""

    def __init__(self, layer: Layer, instance: Any) -> None:
        self._layer, self._instance = layer, instance

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._layer(self._instance, *args, **kwargs)


@overload
def layer(function: Callable[..., Any], /) -> Layer: ...
@overload
def layer(
    *,
    rule: Rule | None = None,
    init: Callable[..., Any] | None = None,
    symbol: str | Callable[..., str] | None = None,
) -> Callable[[Callable[..., Any]], Layer]: ...
def layer(
    function: Callable[..., Any] | None = None,
    /,
    *,
    rule: Rule | None = None,
    init: Callable[..., Any] | None = None,
    symbol: str | Callable[..., str] | None = None,
) -> Any:
    """Make a pure function one operator of the graph.

    Positional arguments are arrays or pytrees of arrays, keyword-only arguments are static. `rule` is the
    hand-written backward rule that `fp.rules.handwritten` uses for it (and `fp.rules.default`, where
    `Rule.platforms` says that it wins), `init` its initialiser. `symbol` is what `fp.draw` writes into its
    circle instead of its name; it may be a function of the layer's arguments, which sees only which of them
    are None.

    Raises:
        TypeError: it is no function; or when called with a positional argument that is no array, or an
            unhashable static one.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> @fp.layer
        ... def scale(x, factor, *, offset=0.0):
        ...     return x * factor + offset
        >>> print(float(scale(2.0, 3.0, offset=1.0)))
        7.0
    """
    if function is None:
        return lambda f: Layer(f, rule, init, symbol)
    if not callable(function):
        raise TypeError(
            f"fp.layer: {function!r} is not a function; write @fp.layer above one, or fp.layer(function)."
        )
    return Layer(function, rule, init, symbol)
