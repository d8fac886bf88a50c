"""A hand-written backward rule: a forward that also returns what it saves, and a backward that reads it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any


class RuleError(TypeError):
    """A rule, a layer or a rule set is wrong; the message names it, the argument and the remedy."""


PLATFORMS = ("cpu", "gpu", "tpu")
_ALSO_CALLED = {"cuda": "gpu", "rocm": "gpu"}


def platform_named(name: Any, where: str) -> str:
    """The platform of this name as `jax.default_backend()` calls it: `"gpu"` also for cuda and rocm.

    Raises:
        RuleError: there is none; `where` says whose it was to be.
    """
    known = _ALSO_CALLED.get(str(name).lower(), str(name).lower())
    if not isinstance(name, str) or known not in PLATFORMS:
        raise RuleError(
            f"{where}={name!r} is no platform; pass one of {', '.join(map(repr, PLATFORMS))} "
            "('cuda' and 'rocm' are 'gpu')."
        )
    return known


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
    * `platforms`: those of `"cpu"`, `"gpu"` and `"tpu"` on which the rule was measured to win over autodiff,
      for `fp.rules.default`; `None` means that it cannot lose anywhere.
    * `jvp(residuals, tangents, **static) -> ẏ`: forward mode; `tangents` has the structure of `args`,
      `None` where an argument is not perturbed. Without it, forward mode is the transpose of `backward`.
    * `value(*args, **static) -> y`: the operator where nothing is differentiated, if the forward does more
      work than that. Without it, the forward's own value.
    * `applies(*args, **static) -> True | str`: receives shapes and dtypes; a string says why the
      operator is left to autodiff.
    * `claims(**static)`: of an operator with a body, the equations in it that the rule differentiates itself;
      the rule set's own rules are not attached to these.
    * `sized`: forward, backward, jvp, value, applies and claims take `machine=`, the `fp.Machine` that is
      compiled for, from which they compute the sizes of chunks and blocks.
    * `neighbourly`: the same functions take `beside=`, the types of operands and the static parameters of the
      ruled operator of the same name that last read a first operand of the same type; None where that is not
      known.
    * `ways`: the same rule done otherwise, by name, for `fp.rules.measured` to choose from.
    * `pure`: forward, backward and jvp read nothing but their arguments, so that outside of `jit` they are
      compiled once for arguments of the same types.

    Raises:
        RuleError: `forward`, `backward`, `jvp`, `applies`, `value`, `claims` or `equations` is not callable;
            a platform is unknown.

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
    pure: bool = False
    sized: bool = False
    neighbourly: bool = False
    ways: Callable[[], Mapping[str, Rule]] | None = None

    def __post_init__(self) -> None:
        for field in ("forward", "backward", "equations", "jvp", "applies", "value", "claims", "ways"):
            value = getattr(self, field)
            optional = field not in ("forward", "backward")
            if not (callable(value) or (optional and value is None)):
                raise RuleError(f"Rule: {field}={value!r} is not callable; pass a function.")
        if self.platforms is not None:
            given = {self.platforms} if isinstance(self.platforms, str) else self.platforms
            named = frozenset(platform_named(p, "Rule: a name in platforms") for p in given)
            object.__setattr__(self, "platforms", named)

    def with_static(self, **chosen: Any) -> Rule:
        """The same rule with other values for some of the operator's static parameters."""
        names = ("forward", "backward", "jvp", "value", "applies")
        given = {name: getattr(self, name) for name in names}
        changed: dict[str, Any] = {
            name: _WithStatic(fun, tuple(chosen.items())) for name, fun in given.items() if fun is not None
        }
        return replace(self, ways=None, **changed)

    def wins_on(self, platform: str) -> bool:
        """Whether the rule was measured to win on this backend, or cannot lose."""
        return self.platforms is None or platform in self.platforms


@dataclass(frozen=True)
class _WithStatic:
    """A function of a rule with some of its static parameters chosen."""

    function: Callable[..., Any]
    chosen: tuple[tuple[str, Any], ...]

    def __call__(self, *args: Any, **static: Any) -> Any:
        return self.function(*args, **{**static, **dict(self.chosen)})
