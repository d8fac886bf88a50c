"""Layers, rules, and sets of rules.

A *layer* is a pure function that stays one operator of the graph. A *rule* is a hand-written backward
rule: a forward that also returns what it saves, and a backward that reads it. A *rule set* says which
rule belongs to which operator; it is immutable, hashable, and an argument of every transformation, so
that no hidden state can make a cached program stale.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, wraps
from typing import Any, NoReturn, TypeAlias, overload

import jax
import jax.numpy as jnp
import numpy as np

from funcprop import _compat
from funcprop.layer_calls import LayerCall, boundary_p


class RuleError(TypeError):
    """A rule, a layer or a rule set is wrong; the message names it, the argument and the remedy."""


@dataclass(frozen=True)
class Rule:
    """A hand-written backward rule for one operator.

    With `y = f(x₁, …, xₙ)` and the cotangent `ȳ = ∂J/∂y`, the rule computes `x̄ᵢ = (∂y/∂xᵢ)ᵀ ȳ`:

    * `forward(*args, **static) -> (y, residuals)`: the value, and what the backward needs. `residuals`
      is a NamedTuple of arrays (any pytree of arrays is accepted).
    * `backward(residuals, cotangents, needs, **static) -> (x̄₁, …, x̄ₙ)`: `cotangents` has the structure
      of `y`; `needs` has the structure of `args` with a bool for every array and says which cotangents
      are wanted. A cotangent that is not needed may be `None`. It must be linear in `cotangents`, and
      every returned cotangent has the shape and dtype of its argument. A residual that the wanted
      cotangents do not read is not saved.
    * `equations`: the same rule as symbols, for `fp.derive`.
    * `platforms`: backends on which the rule was measured to win over autodiff, for
      `fp.rules.default`; `None` means that it cannot lose anywhere.
    * `jvp(residuals, tangents, **static) -> ẏ`: forward mode; `tangents` has the structure of `args`,
      `None` where an argument is not perturbed. Without it, forward mode is the transpose of `backward`.
    * `value(*args, **static) -> y`: the operator where nothing is differentiated, if the forward does more
      work than that. Without it, the forward's own value.
    * `applies(*args, **static) -> True | str`: receives shapes and dtypes; a string says why the
      operator is left to autodiff.
    * `claims(**static)`: of an operator with a body, the equations in it that the rule differentiates itself;
      the rule set's own rules are not attached to these.

    Raises:
        RuleError: `forward`, `backward`, `jvp`, `applies`, `value`, `claims` or `equations` is not callable.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> from typing import NamedTuple
        >>> class Residuals(NamedTuple):
        ...     y: jnp.ndarray
        >>> def forward(x, **_):
        ...     y = jnp.tanh(x)
        ...     return y, Residuals(y)
        >>> def backward(residuals, cotangent, needs, **_):
        ...     return (cotangent * (1 - residuals.y**2),)
        >>> rules = fp.rules.autodiff.replace({"tanh": fp.Rule(forward, backward)})
        >>> float(fp.grad(jnp.tanh, rules=rules)(0.0))
        1.0
    """

    forward: Callable[..., tuple[Any, Any]]
    backward: Callable[..., Any]
    equations: Callable[..., Any] | None = None
    platforms: frozenset[str] | None = None
    jvp: Callable[..., Any] | None = None
    applies: Callable[..., bool | str] | None = None
    value: Callable[..., Any] | None = None
    claims: Callable[..., Collection[Any]] | None = None

    def __post_init__(self) -> None:
        for field in ("forward", "backward", "equations", "jvp", "applies", "value", "claims"):
            value = getattr(self, field)
            optional = field not in ("forward", "backward")
            if not (callable(value) or (optional and value is None)):
                raise RuleError(f"Rule: {field}={value!r} is not callable; pass a function.")
        if self.platforms is not None:
            object.__setattr__(self, "platforms", frozenset(self.platforms))

    def wins_on(self, platform: str) -> bool:
        """Whether the rule was measured to win on this backend, or cannot lose."""
        return self.platforms is None or platform in self.platforms


# --- layers -----------------------------------------------------------------------------------


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
    circle instead of its name; it may be a function of the layer's arguments, of which it can tell only which
    are None.

    Raises:
        TypeError: when called with a positional argument that is no array, or an unhashable static one.

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
    return Layer(function, rule, init, symbol)


# --- rule sets --------------------------------------------------------------------------------

OperatorKey: TypeAlias = "str | Layer"


class RuleSet(Mapping[OperatorKey, Rule]):
    """An immutable, hashable table from operators to rules.

    Keys are names of JAX primitives (`"tanh"`, `"dot_general"`) and layers. `own` says whether a layer's
    own rule is used where the table has no entry for it; `measured` restricts the table, and the own
    rules, to those that win on the running platform. A rule put in by `replace` is always used.
    """

    name: str
    _rules: dict[OperatorKey, Rule]
    _own: bool
    _measured: bool
    _chosen: dict[OperatorKey, Rule | None]
    _identity: tuple[Any, ...]

    def __init__(
        self,
        name: str,
        rules: Mapping[OperatorKey, Rule] | None = None,
        *,
        own: bool = False,
        measured: bool = False,
        chosen: Mapping[OperatorKey, Rule | None] | None = None,
    ) -> None:
        for key, rule in [*(rules or {}).items(), *(chosen or {}).items()]:
            _check_entry(key, rule)
        fields: dict[str, Any] = {
            "name": name, "_rules": dict(rules or {}), "_chosen": dict(chosen or {}),
            "_own": own, "_measured": measured,
        }  # fmt: skip
        identity = (name, own, measured, *(frozenset(fields[key].items()) for key in ("_rules", "_chosen")))
        vars(self).update(fields, _identity=identity)

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise AttributeError(f"rule set {self.name!r} is immutable; `replace` makes another one.")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"rule set {self.name!r} is immutable; `replace` makes another one.")

    def find(self, operator: OperatorKey, platform: str) -> Rule | None:
        """The rule for an operator on a platform, or None where autodiff does it."""
        if operator in self._chosen:
            return self._chosen[operator]
        rule = self._rules.get(operator)
        if rule is None and self._own and isinstance(operator, Layer):
            rule = operator.rule
        if rule is not None and self._measured and not rule.wins_on(platform):
            return None
        return rule

    def is_replaced(self, operator: OperatorKey) -> bool:
        """Whether `replace` decided what rule the operator has."""
        return operator in self._chosen

    def replace(self, changes: Mapping[OperatorKey, Rule | None]) -> RuleSet:
        """A new set with other rules for some operators; `None` leaves the operator to autodiff.

        Raises:
            RuleError: an operator is unknown, or a value is not a rule.
        """
        return RuleSet(
            self.name, self._rules, own=self._own, measured=self._measured, chosen={**self._chosen, **changes}
        )

    def __getitem__(self, operator: OperatorKey) -> Rule:
        rule = self.find(operator, jax.default_backend())
        if rule is None:
            raise KeyError(operator)
        return rule

    def __iter__(self) -> Iterator[OperatorKey]:
        platform = jax.default_backend()
        return (key for key in {**self._rules, **self._chosen} if self.find(key, platform) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RuleSet) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    def __repr__(self) -> str:
        rows = [f"RuleSet {self.name!r} on {jax.default_backend()}: {len(self)} rules"]
        if self._own:
            rows[0] += ", and each layer's own"
        for key, rule in {**self._rules, **self._chosen}.items():
            label = key if isinstance(key, str) else f"layer {key.name}"
            active = self.find(key, jax.default_backend())
            where = "any" if rule is None or rule.platforms is None else ",".join(sorted(rule.platforms))
            rows.append(f"  {label:32} {'active' if active else 'autodiff':9} wins on: {where or '-'}")
        return "\n".join(rows)


def _check_entry(key: Any, rule: Any) -> None:
    if isinstance(key, str):
        if key not in _compat.known_primitives():
            raise RuleError(
                f"rule set: unknown operator {key!r}; use the name of a JAX primitive as "
                "`jax.make_jaxpr` prints it, or the layer itself (an object made by `fp.layer`)."
            )
    elif not isinstance(key, Layer):
        raise RuleError(
            f"rule set: operator {key!r} is neither the name of a JAX primitive nor a layer; "
            "decorate the function with `fp.layer`."
        )
    if rule is not None and not isinstance(rule, Rule):
        raise RuleError(f"rule set: {key!r} maps to {rule!r}; give an `fp.Rule`, or None for autodiff.")
