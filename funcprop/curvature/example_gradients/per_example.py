"""`fp.per_example(model, loss)`: quantities of every example's gradient, in one pass."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from funcprop.curvature.data_set import DataSet
from funcprop.curvature.example_gradients.entering_parameters import Model, Study, route
from funcprop.curvature.example_gradients.loss_roots import Loss, Losses, LossRoot, root_of
from funcprop.curvature.example_gradients.measurement import Sweep
from funcprop.curvature.example_gradients.mixed_examples import (
    example_of,
    trace_example,
    trace_loss,
    types_of,
)
from funcprop.curvature.example_gradients.quantities import (
    ALIASES,
    EXACT,
    GRADIENT,
    MEANS_OF,
    OF_MEANS,
    QUANTITIES,
    ROWS,
    SAMPLED,
    VALUE,
    Part,
)
from funcprop.curvature.examples import batch_size, loss_of_one, model_of_one, of_examples, total_of
from funcprop.curvature.likelihood import Likelihood, likelihood_of
from funcprop.graph.graph import aligned
from funcprop.operators.parameters import Parameters, Where, single_at_least
from funcprop.operators.subset import restricted
from funcprop.program.call import in_order, require_values
from funcprop.program.program import Program
from funcprop.program.sizes import budget_bytes
from funcprop.rules.rule_set import RuleSet

# The bytes that stacked cotangents, or gradients of single examples, may take at a time.
LIMIT = 64 << 20

# What is known of shapes alone, for messages.
AUDIT = "fp.per_example(model, loss).audit(…)"


class GradientRoute(NamedTuple):
    """How one leaf's gradients are found: a way for each place where it enters, and why; and its factors.

    All quantities of gradients are exact in every way. `expand` and `reduce` are what KFAC, KFLR and EKFAC
    keep of the leaf's block: `A ⊗ G` (over how many positions), an exact block, or a diagonal, and why.
    """

    path: str
    ways: tuple[str, ...]
    reasons: tuple[str, ...]
    expand: str
    reduce: str

    @property
    def falls_back(self) -> bool:
        """Whether each example's gradient is made, for want of an outer form."""
        return any(way in ("gradient", "contraction") for way in self.ways)


class Audit(tuple[GradientRoute, ...]):
    """The routes of all parameters, as a table when printed; `loss` says as what the loss was recognised."""

    loss: str | None = None

    def __str__(self) -> str:
        rows = [("parameter", "gradients", "through", "KFAC", "with sharing='reduce'")]
        for r in self:
            ways = list(zip(r.ways or ("unused",), r.reasons or ("",), strict=True))
            rows.append((r.path, *ways[0], r.expand, "the same" if r.reduce == r.expand else r.reduce))
            rows += [("", *way, "", "") for way in ways[1:]]
        return aligned(rows, set(), 80) + (f"\n\nThe loss: {self.loss}" if self.loss else "")


class PerExample:
    """The function that `fp.per_example` returns; `audit` says by which way each parameter goes."""

    def __init__(
        self,
        model: Model,
        loss: Loss | Likelihood | str,
        where: Where | None,
        rules: RuleSet | None,
        limit: int,
        samples: int,
    ) -> None:
        self.model, self.loss, self.where, self.rules, self.limit = model, loss, where, rules, limit
        self.samples = require_drawn(samples)

    def __call__(
        self,
        params: Any,
        x: Any,
        y: Any,
        quantities: Collection[str],
        key: Any = None,
        *,
        weights: Any = None,
    ) -> dict[str, Any]:
        """The quantities, each a pytree like `params` but for `gram`, `ntk` and `value`."""
        return self.with_rootless(params, x, y, quantities, key, weights)[0]

    def over_data(
        self, data: DataSet, params: Any, quantities: Collection[str], key: Any = None
    ) -> dict[str, Any]:
        """The quantities of a data set: a pass for all means, and one for what has a row for each example."""
        names = _checked(quantities)
        pairs = [name for name in names if QUANTITIES.get(name) and QUANTITIES[name].whole]
        if pairs:
            raise ValueError(
                f"per_example: {pairs[0]!r} is of all pairs of examples, which are in different minibatches; "
                "ask for it of one batch."
            )
        factors = [name for name in names if name.startswith(("kfac", "kflr"))]
        if factors:
            raise ValueError(
                f"per_example: {factors[0]!r} of a data set is "
                "fp.curvature.over(batches)(fp.kfac(…))(params).factors."
            )
        rows = {name for name in names if name in ROWS}
        means = {part for name in names if name not in ROWS for part in MEANS_OF.get(name, (name,))}

        def asked(wanted: Collection[str]) -> Any:
            def quantity(x: Any, y: Any = None, weights: Any = None, key: Any = None) -> Any:
                found = self(params, x, y, sorted(wanted), key, weights=weights)
                return {name: found[name] for name in sorted(wanted)}

            return quantity

        found = data.mean(asked(means), key=key).mean if means else {}
        found |= data.rows(asked(rows), key=key) if rows else {}
        for name in names:
            if name in MEANS_OF:
                found[name] = jax.tree.map(OF_MEANS[name], *(found[part] for part in MEANS_OF[name]))
        return {asked: found[name] for asked, name in zip(quantities, names, strict=True)}

    def with_rootless(
        self, params: Any, x: Any, y: Any, quantities: Collection[str], key: Any, weights: Any
    ) -> tuple[dict[str, Any], Any]:
        """The quantities, and at which examples the loss is not convex, so that some are NaN."""
        names = _checked(quantities)
        sampled = [n for n in names if n != VALUE and any(p.group == SAMPLED for p in QUANTITIES[n].parts)]
        if sampled and key is None:
            raise ValueError(
                f"per_example: {sampled[0]!r} is an estimate by random signs; "
                "pass key=jax.random.key(…) beside x and y."
            )
        require_values("per_example", {"params": params, "x": x, "y": y}, AUDIT)
        size = batch_size(x, y, "per_example")
        loss_of, y, weights = of_examples(self.loss, y, weights, size, "per_example")
        of_chosen, params = restricted(self.model, params, self.where)
        Parameters.of(params)
        model, loss = programs(of_chosen, loss_of, params, x, y)
        wanted = tuple(sorted(set(names)))
        options = SweepOptions(self.rules, self.limit, self.samples)
        found, rootless = _quantities(model, loss, params, x, y, key, weights, wanted, options)
        return {asked: found[name] for asked, name in zip(quantities, names, strict=True)}, rootless

    def audit(self, params: Any, x: Any, y: Any = None) -> Audit:
        """List for each parameter how its gradients are found, why, and what KFAC keeps of its block.

        Nothing is computed; `jax.ShapeDtypeStruct`s are enough. With `y`, also what the loss was recognised
        as, and how many columns Gauss-Newton quantities sweep.
        """
        model, params = restricted(self.model, params, self.where)
        Parameters.of(params)
        study = Study.of(trace_example(model, types_of(params), example_of(x)), params, self.rules)
        size, routes = batch_size(x, () if y is None else y), []
        kept = study.kept(jax.tree.leaves(params), x, size)
        for i, (path, _) in enumerate(jax.tree.leaves_with_path(params)):
            found = [route(tap) for tap in study.taps if tap.view.leaf == i]
            ways, reasons = zip(*found, strict=True) if found else ((), ())
            routes.append(GradientRoute(jax.tree_util.keystr(path), ways, reasons, *kept[i]))
        audit = Audit(routes)
        if y is not None:
            label = example_of(y)
            root = root_of(losses_of(self.loss, study.output, label), study.output, label)
            audit.loss = f"{root.kind}; {root.columns} columns for each example"
        return audit


@functools.partial(jax.jit, static_argnames=("names", "options"))
def _quantities(
    model: Program,
    loss: Losses,
    params: Any,
    x: Any,
    y: Any,
    key: Any,
    weights: Any,
    names: tuple[str, ...],
    options: SweepOptions,
) -> tuple[dict[str, Any], Any]:
    parts = frozenset(p for n in names if n != VALUE for p in QUANTITIES[n].parts)
    leaves, tree = jax.tree.flatten(params)
    size = batch_size(x, y)
    made = sweep(model, loss, params, y, parts, weights, options)
    (values, rootless), found = made(leaves, x, y, key, weights, size)
    total = total_of(weights, size)
    results: dict[str, Any] = {}
    for name in names:
        if name == VALUE:
            values = values.astype(single_at_least(values.dtype))
            results[name] = jnp.sum(values if weights is None else values * weights) / total
            continue
        each = [QUANTITIES[name](here, total) for here in found]
        results[name] = sum(each) if QUANTITIES[name].whole else jax.tree.unflatten(tree, each)
    return results, rootless


class SweepOptions(NamedTuple):
    """How a sweep is made; hashable."""

    rules: RuleSet | None
    limit: int
    samples: int
    joint: bool = False


def programs(
    model: Model, loss: Loss | Likelihood | str, params: Any, x: Any, y: Any
) -> tuple[Program, Losses]:
    """The model and the loss of one example, or a likelihood, as they are now."""
    label = example_of(y)
    if not callable(loss):
        of_model = trace_example(model, types_of(params), example_of(x))
        return of_model, losses_of(loss, of_model.results, label)
    with in_order(model, loss, params, example_of(x), label):
        of_model = trace_example(model, types_of(params), example_of(x))
        return of_model, losses_of(loss, of_model.results, label)


def losses_of(loss: Loss | Likelihood | str, output: Any, label: Any) -> Losses:
    """The programs of a loss, or of a likelihood, of one example.

    Of a likelihood by name the negative logarithm's Hessian is its Fisher matrix, whatever the target is.
    """
    if callable(loss):
        return Losses(trace_loss(loss, output, label))
    density = likelihood_of(loss)
    targets = bool(jax.tree.leaves(label))
    value = trace_loss(density.negative_log, output, label) if targets else None
    if isinstance(loss, str) and value is not None:
        return Losses(value)

    def drawn(o: Any, key: Any) -> Any:
        y = jax.lax.stop_gradient(density.sample(key, o))
        return jax.grad(density.negative_log)(o, y)

    return Losses(
        value,
        Program.of(density.fisher, output, output),
        Program.of(drawn, output, jax.eval_shape(lambda: jax.random.key(0))),
    )


def sweep(
    model: Program,
    loss: Losses,
    params: Any,
    y: Any,
    parts: Collection[Part],
    weights: Any,
    options: SweepOptions,
) -> Sweep:
    """The sweep for some contractions."""
    root: LossRoot | None = None
    if loss.value is None and any(part.group == GRADIENT for part in parts):
        raise ValueError(
            "y=None: gradients, and kind='empirical', are at the targets of the data; give them as y."
        )
    if any(part.group in (SAMPLED, EXACT) for part in parts):
        root = root_of(loss, model.results, example_of(y))
    study = Study.of(model, params, options.rules, options.joint)
    weighted = weights is not None
    return Sweep(study, loss, root, frozenset(parts), options.limit, {}, options.samples, weighted)


def per_example(
    model: Model,
    loss: Loss | Likelihood | str,
    *,
    batched: bool = False,
    where: Where | None = None,
    samples: int = 1,
    rules: RuleSet | None = None,
    budget: int | str = LIMIT,
) -> PerExample:
    """Quantities of the gradient of every example, in one forward and one backward sweep.

    `per_example(model, loss)(params, x, y, quantities={...}, key=None, weights=None)` returns `{quantity:
    pytree like params}`. With `weights`, one number ≥ 0 for each example (0 for padding), every mean is
    `Σ w q / Σ w`; what is of single examples (`"gradients"`, `"norm"`, `"gram"`, `"ntk"`) has
    none. Weights of positions, `[n, *positions]`, are for a loss that returns one value for each of them, or
    a likelihood of one by its name: an example's loss is the weighted mean of its positions', and it counts
    as the sum of their weights. With `W[n]` the gradient of example n's loss in a leaf and N examples, all
    conventions fixed:

    * `"value"`: the mean loss. `"gradient"`: `1/N Σ W`, of the mean loss.
    * `"gradients"` (or `"batch_gradients"`): `W`, N × leaf. `"norm"`: `‖W[n]‖`, an array of length N for each
      leaf, not squared; no gradient is made for it.
    * `"second_moment"`: `1/N Σ W²`; `"variance"`: `1/N Σ (W − mean)²`; `"snr"`: `mean² / variance`, entry by
      entry. (The variance is a difference of moments: where the mean is large beside it, digits are lost.)
    * `"gram"`: `⟨W[n], W[m]⟩` over all leaves, N × N. `"ntk"`: the same of the C entries of the output, N × C
      × N × C.
    * `"diag_ggn"`: the diagonal of the Gauss-Newton matrix `1/N Σ_n Jᵀ (∇²ℓ) J` of the **mean** loss, without
      a factor ½; `"trace_ggn"`: the trace of each leaf's block. `"diag_ggn_mc"`, `"trace_ggn_mc"`: unbiased
      estimates, from one random combination of columns for each example; they need `key`.
    * `"kfac"`, `"kfac_reduce"` (random columns; need `key`), `"kflr"`, `"kflr_reduce"` (all columns),
      `"kfac_empirical"`, `"kfac_empirical_reduce"` (gradients): Kronecker factors `(A, G)` of each leaf; see
      `fp.kfac`.

    A parameter that enters through products, convolutions, tables, sums and scalings, also under a `scan`, as
    layers that a scan stacks, or several times, is contracted from what met it and what came back; any other
    has its gradients made one by one. `.audit(params, x)` says which way each goes, and why. All are exact.

    Every call traces both functions, and so reads anew what they read besides their arguments; what was
    compiled for equal ones is found again. Under `jit` nothing is traced again.

    Args:
        model: `model(params, x)`, for ONE example; returns floating-point arrays.
        loss: `loss(output, y)`, for ONE example; a scalar. For Gauss-Newton quantities it must be convex in
            the output: they are NaN where it is not. Or a likelihood, by its name or an
            `fp.curvature.Likelihood`: these quantities are then of its Fisher matrix, which is never
            indefinite, and need no targets (y=None).
        batched: both are functions of a whole batch, of which the loss is a mean; they are called with
            batches of one.
        where: a subset of the parameters, as in `fp.hessian`; the others are constants, None in the result.
        samples: how many random columns estimates are the mean of.
        rules: a rule set; the default rules if None.
        budget: bytes that the stacked cotangents of several columns may take at a time; the batch is swept in
            parts.

    Raises:
        ValueError: a quantity is unknown; the leading axes of `x` and `y` differ; an estimate has no key; or
            the examples mix: the model reduces over a named axis, computes batch statistics, or returns what
            the loss does not read.
        TypeError: a parameter has no gradient, or the loss is no scalar.

    References: Goodfellow, "Efficient per-example gradient computations", 2015 (norms); Dangel, Kunstner and
    Hennig, "BackPACK: packing more into backprop", ICLR 2020 (moments, diagonals); the papers at `fp.kfac`.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> model, loss = lambda w, x: jnp.vdot(w, x), lambda output, y: (output - y) ** 2 / 2
        >>> x, y = jnp.array([[3.0, 4.0], [0.0, 1.0]]), jnp.array([1.0, 0.0])
        >>> found = fp.per_example(model, loss)(jnp.zeros(2), x, y, {"norm", "diag_ggn"})
        >>> print(found["norm"], found["diag_ggn"])
        [5. 0.] [4.5 8.5]
    """
    loss = loss_of_one(loss, batched) if callable(loss) else loss
    limit = budget_bytes(budget, "budget")
    return PerExample(model_of_one(model, batched), loss, where, rules, limit, samples)


def require_drawn(samples: int) -> int:
    """`samples`, if it is a number of random columns."""
    if samples < 1:
        raise ValueError(f"samples={samples}; an estimate takes 1 random column or more.")
    return samples


def _checked(quantities: Collection[str]) -> list[str]:
    known = [*QUANTITIES, *ALIASES, VALUE]
    if isinstance(quantities, str) or not quantities:
        raise ValueError(
            f"per_example: quantities={quantities!r}; pass a set of names among {', '.join(known)}."
        )
    for name in quantities:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            raise ValueError(
                f"per_example: unknown quantity {name!r}{f' (did you mean {near[0]!r}?)' if near else ''}; "
                f"there are {', '.join(known)}."
            )
    return [ALIASES.get(name, name) for name in quantities]
