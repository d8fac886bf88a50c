"""`fp.kfac` and `fp.ekfac`: Kronecker-factored curvature of any model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from funcprop.curvature.convexity import REMEDY, require_convex
from funcprop.curvature.data_set import DataSet
from funcprop.curvature.example_gradients.entering_parameters import Model
from funcprop.curvature.example_gradients.gradient_forms import Factors
from funcprop.curvature.example_gradients.loss_roots import Loss, Losses
from funcprop.curvature.example_gradients.per_example import (
    AUDIT,
    LIMIT,
    SweepOptions,
    programs,
    require_drawn,
    sweep,
)
from funcprop.curvature.example_gradients.quantities import (
    EXACT,
    EXPAND,
    GRADIENT,
    REDUCE,
    ROTATED,
    SAMPLED,
    Part,
)
from funcprop.curvature.examples import batch_size, loss_of_one, model_of_one, of_examples, total_of
from funcprop.curvature.kronecker import Eigen, Kronecker, KroneckerProduct
from funcprop.curvature.likelihood import Likelihood
from funcprop.operators.parameters import Parameters, Where
from funcprop.operators.subset import restricted
from funcprop.program.call import require_values
from funcprop.program.program import Program
from funcprop.program.sizes import budget_bytes
from funcprop.rules.rule_set import RuleSet

_GROUPS = {"mc": SAMPLED, "exact": EXACT, "empirical": GRADIENT}
_SHARING = {"expand": EXPAND, "reduce": REDUCE}


def kfac(
    model: Model,
    loss: Loss | Likelihood | str,
    *,
    kind: str = "mc",
    sharing: str = "expand",
    bias: str = "separate",
    samples: int = 1,
    batched: bool = False,
    where: Where | None = None,
    rules: RuleSet | None = None,
    budget: int | str = LIMIT,
) -> KroneckerFactors:
    """Kronecker-factored curvature, `kfac(model, loss)(params, x, y, key=None, weights=None) -> Kronecker`.

    For each parameter `A ⊗ G` in place of its block of the Gauss-Newton matrix of the **mean** loss; the
    module `funcprop.curvature.kronecker` has the conventions. Exact for one example, and for linear networks
    with squared error. With `weights`, one number ≥ 0 for each example (0 for padding), means are `Σ w q /
    Σ w`; or one for each position of it, as in `fp.per_example`: in `A` every position with a weight counts
    once. Every call traces both functions, as there.

    Args:
        model, loss: of ONE example, as in `fp.per_example`. With a likelihood in place of the loss, its name
            or an `fp.curvature.Likelihood`, the factors are those of its Fisher matrix; "exact" and "mc" then
            need no targets (y=None), and "mc" draws them from the model.
        kind: "mc", random combinations of the root's columns (needs `key`); "exact", all columns (KFLR);
            "empirical", the gradients themselves.
        sharing: "expand" or "reduce", for weights that are used at several positions.
        bias: "separate", a block of its own for each parameter, or "joint", one block for a matrix and the
            bias that is added to its product: `A` has one more row and column, of the activation 1, and
            stands in `.factors` under the path of the matrix. Other biases keep their own blocks.
        samples: how many random combinations, with "mc".
        batched, where, rules, budget: as in `fp.per_example`.

    Returns:
        A function that returns a `Kronecker`: a linear operator with `.factors[path] -> (A, G)`,
        `.inverse(damping)`, `.logdet()`, `.sqrt()`, `.update(other, decay)`.

    Raises:
        ValueError: `kind`, `sharing` or `bias` is not known, there is no bias to be joined, there is no key
            for "mc", or the loss is not convex in the output; also as `fp.per_example`.

    References: Martens and Grosse, ICML 2015; Botev, Ritter and Barber, ICML 2017; Eschenhagen et al.,
    NeurIPS 2023.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> squared = lambda output, y: jnp.sum((output - y) ** 2) / 2
        >>> w, x, y = jnp.ones((2, 1)), jnp.eye(2), jnp.zeros((2, 1))
        >>> A = fp.kfac(lambda w, x: x @ w, squared, kind="exact")(w, x, y)
        >>> print(A.dense())
        [[0.5 0. ]
         [0.  0.5]]
    """
    loss = loss_of_one(loss, batched) if callable(loss) else loss
    options = SweepOptions(rules, budget_bytes(budget, "budget"), require_drawn(samples), _joint(bias))
    return KroneckerFactors(model_of_one(model, batched), loss, _chosen(kind, sharing), where, options)


def ekfac(
    model: Model,
    loss: Loss | Likelihood | str,
    *,
    kind: str = "mc",
    sharing: str = "expand",
    bias: str = "separate",
    samples: int = 1,
    batched: bool = False,
    where: Where | None = None,
    rules: RuleSet | None = None,
    budget: int | str = LIMIT,
) -> KroneckerFactors:
    """KFAC's eigenvectors with the curvature's own second moments along them as eigenvalues.

    `ekfac(model, loss)(params, x, y, key=None, weights=None)`; with `A ⊗ G = U S Uᵀ` the eigenvalues are
    `diag(Uᵀ (1/N Σ W Wᵀ) U)`, which are the best in the Frobenius norm for these vectors. Arguments and
    errors are those of `fp.kfac`; the result is in its eigenbasis and has no `.factors`.

    Reference: George et al., "Fast approximate natural gradient descent in a Kronecker-factored eigenbasis",
    NeurIPS 2018.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> squared = lambda output, y: jnp.sum((output - y) ** 2) / 2
        >>> w, x, y = jnp.ones((2, 1)), jnp.eye(2), jnp.zeros((2, 1))
        >>> E = fp.ekfac(lambda w, x: x @ w, squared, kind="exact")(w, x, y)
        >>> print(E.trace())
        1.0
    """
    loss = loss_of_one(loss, batched) if callable(loss) else loss
    options = SweepOptions(rules, budget_bytes(budget, "budget"), require_drawn(samples), _joint(bias))
    return EigenFactors(model_of_one(model, batched), loss, _chosen(kind, sharing), where, options)


@dataclass(frozen=True, eq=False)
class KroneckerFactors:
    """What `fp.kfac` returns: `(params, x, y, key=None, weights=None) -> Kronecker`."""

    model: Model
    loss: Loss | Likelihood | str
    part: Part
    where: Where | None
    options: SweepOptions
    name: ClassVar[str] = "kfac"

    def __call__(
        self, params: Any, x: Any, y: Any = None, key: Any = None, *, weights: Any = None
    ) -> Kronecker:
        """The factors of a batch; model and loss are traced."""
        found, rootless = self.with_rootless(params, x, y, key, weights)
        require_convex("kfac", rootless, REMEDY)
        return found

    def over_data(self, data: DataSet, params: Any, *, key: Any = None) -> Kronecker:
        """The factors of a data set, by one pass."""
        return self._mean(data, params, key, None, lambda found: found)

    def _mean(
        self,
        data: DataSet,
        params: Any,
        key: Any,
        bases: Sequence[Eigen] | None,
        part: Callable[[Kronecker], Any],
    ) -> Any:
        def quantity(x: Any, y: Any = None, weights: Any = None, key: Any = None) -> Any:
            found, rootless = self.with_rootless(params, x, y, key, weights, bases)
            broken = jnp.zeros(()) if rootless is None else rootless.any().astype(float)
            # Where a loss has no root factors are NaN, and that is named below.
            return broken, jax.tree.map(lambda leaf: jnp.where(broken > 0, 0, leaf), part(found))

        broken, found = data.mean(quantity, key=key).mean
        if broken > 0:
            raise ValueError(
                f"kfac: the loss is not convex in the model's output at some examples; {REMEDY}."
            )
        return found

    def with_rootless(
        self, params: Any, x: Any, y: Any, key: Any, weights: Any, bases: Sequence[Eigen] | None = None
    ) -> tuple[Kronecker, Any]:
        """The factors, or with `bases` the eigenvalues in them; and for which examples they are NaN."""
        require_values(self.name, {"params": params, "x": x, "y": y}, AUDIT)
        loss, y, weights = of_examples(self.loss, y, weights, batch_size(x, y, self.name), self.name)
        of_chosen, params = restricted(self.model, params, self.where)
        Parameters.of(params)
        if self.part.group == SAMPLED and key is None:
            raise ValueError(
                "kfac: kind='mc' draws random signs; pass key=jax.random.key(…) beside x and y, "
                "or kind='exact'."
            )
        functions = programs(of_chosen, loss, params, x, y)
        arguments = (*functions, params, x, y, key, weights)
        if bases is None:
            return _factors(*arguments, self.part, self.options)
        return _eigenvalues(*arguments, bases, self.part, self.options)


@dataclass(frozen=True, eq=False)
class EigenFactors(KroneckerFactors):
    """What `fp.ekfac` returns."""

    name: ClassVar[str] = "ekfac"

    def __call__(
        self, params: Any, x: Any, y: Any = None, key: Any = None, *, weights: Any = None
    ) -> Kronecker:
        """The factors of a batch in their eigenbasis; model and loss are traced."""
        plain, rootless = self.with_rootless(params, x, y, key, weights)
        require_convex("ekfac", rootless, REMEDY)
        return self.with_rootless(params, x, y, key, weights, eigenbases(plain))[0]

    def over_data(self, data: DataSet, params: Any, *, key: Any = None) -> Kronecker:
        """The factors of a data set in their eigenbasis: a pass for it, and one for the eigenvalues."""
        plain = self._mean(data, params, key, None, lambda found: found)
        bases = eigenbases(plain)
        values = self._mean(data, params, key, bases, _values)
        blocks = [replace(block, values=found) for block, found in zip(bases, values, strict=True)]
        return replace(plain, blocks=tuple(blocks))


def _values(found: Kronecker) -> list[Any]:
    """The eigenvalues of all blocks."""
    return [block.values for block in found.blocks if isinstance(block, Eigen)]


def eigenbases(factored: Kronecker) -> tuple[Eigen, ...]:
    """The blocks by their eigenvectors."""
    return tuple(block.eigen() for block in factored.blocks)


@functools.partial(jax.jit, static_argnames=("part", "options"))
def _factors(
    model: Program,
    loss: Losses,
    params: Any,
    x: Any,
    y: Any,
    key: Any,
    weights: Any,
    part: Part,
    options: SweepOptions,
) -> tuple[Kronecker, Any]:
    names, size = Parameters.of(params), batch_size(x, y)
    total = total_of(weights, size)
    found = sweep(model, loss, params, y, [part], weights, options)
    (_, rootless), factors = found(jax.tree.leaves(params), x, y, key, weights, size)
    groups, blocks = found.study.groups, []
    if options.joint and len(groups) == len(factors):
        raise ValueError(
            "kfac: bias='joint', but no bias is added to the result of a product alone; use bias='separate'."
        )
    for group in groups:
        both = factors[group[0]][part]
        layout = found.study.layout(group, both)
        mean, g = both.activations / total, both.cotangents / total
        if both.seen is None:
            blocks.append(KroneckerProduct.of(mean, g, layout))
        else:
            blocks.append(KroneckerProduct(mean, g, both.seen / total, layout))
    return Kronecker(tuple(blocks), names, groups), rootless


@functools.partial(jax.jit, static_argnames=("part", "options"))
def _eigenvalues(
    model: Program,
    loss: Losses,
    params: Any,
    x: Any,
    y: Any,
    key: Any,
    weights: Any,
    bases: Sequence[Eigen],
    part: Part,
    options: SweepOptions,
) -> tuple[Kronecker, Any]:
    names, size, rotated = Parameters.of(params), batch_size(x, y), Part(part.group, ROTATED)
    total = total_of(weights, size)
    found = sweep(model, loss, params, y, [rotated], weights, options)
    groups = found.study.groups
    of_leaves = {group[0]: Factors(block.ua, block.ug) for group, block in zip(groups, bases, strict=True)}
    found = replace(found, bases=of_leaves)
    (_, rootless), squares = found(jax.tree.leaves(params), x, y, key, weights, size)
    blocks = [
        replace(block, values=squares[group[0]][rotated] / total)
        for block, group in zip(bases, groups, strict=True)
    ]
    return Kronecker(tuple(blocks), names, groups), rootless


def _joint(bias: str) -> bool:
    if bias not in ("separate", "joint"):
        raise ValueError(f"kfac: bias={bias!r} is not known; it is 'separate' or 'joint'.")
    return bias == "joint"


def _chosen(kind: str, sharing: str) -> Part:
    if kind not in _GROUPS:
        raise ValueError(f"kfac: kind={kind!r} is not known; it is one of {', '.join(map(repr, _GROUPS))}.")
    if sharing not in _SHARING:
        raise ValueError(f"kfac: sharing={sharing!r} is not known; it is 'expand' or 'reduce'.")
    return Part(_GROUPS[kind], _SHARING[sharing])
