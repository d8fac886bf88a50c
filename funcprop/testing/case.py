"""What is checked: a rule beside the plain function that it differentiates, at concrete arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import combinations
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcprop import _jax
from funcprop.program.layer_calls import LayerCall
from funcprop.program.linear_map import Arrays
from funcprop.rules.attach import attach
from funcprop.rules.bound_rule import BoundRule
from funcprop.rules.layer import Layer
from funcprop.rules.rule import Rule
from funcprop.rules.rule_set import RuleSet
from funcprop.rules.sets import autodiff
from funcprop.testing.compare import DOUBLE, Claim, Tolerances

BATCH = 3  # examples under vmap and steps under scan


@dataclass(frozen=True, eq=False)
class RuleCase:
    """A rule and its plain function at flat arguments.

    `plain` is the function itself, as flat arrays to flat arrays. `parameters` are the rule's static keyword
    arguments at given arguments. `operator` is the same function as an operator that has the rule in `rules`
    (a layer, or a primitive); a plain function has neither.
    """

    rule: Rule
    subject: str
    plain: Callable[..., Arrays]
    parameters: Callable[[Sequence[Any]], dict[str, Any]]
    tree: Any
    names: tuple[str, ...]
    leaves: Arrays
    operator: Callable[..., Arrays] | None = None
    rules: RuleSet | None = None
    precision: Tolerances = DOUBLE

    def bind(self, leaves: Sequence[Any]) -> BoundRule:
        """The rule at arguments of these types."""
        return BoundRule(self.rule, self.subject, self.parameters(leaves), self.tree, self.names)

    def attached(self, *leaves: Any) -> Arrays:
        """The plain function with the rule as its derivative."""
        return attach(self.bind(leaves), leaves)

    # --- arguments, results, cotangents

    @cached_property
    def smooth(self) -> list[int]:
        """The arguments that have a derivative; the others are integers, booleans and keys."""
        return [i for i, leaf in enumerate(self.leaves) if _jax.is_differentiable(jax.typeof(leaf))]

    @cached_property
    def results(self) -> list[Any]:
        """The types of the results."""
        return list(jax.eval_shape(self.plain, *self.leaves))

    @cached_property
    def smooth_results(self) -> list[int]:
        """The results that have a derivative."""
        return [i for i, result in enumerate(self.results) if _jax.is_differentiable(result)]

    @cached_property
    def cotangents(self) -> Arrays:
        """A random cotangent for every smooth result."""
        return self.random_results(1)

    def random_results(self, seed: int) -> Arrays:
        """Random numbers with the types of the smooth results."""
        rng = generator(seed)
        return [normal_like(rng, self.results[i]) for i in self.smooth_results]

    def random_arguments(self, seed: int) -> Arrays:
        """Random numbers with the types of the smooth arguments."""
        rng = generator(seed)
        return [normal_like(rng, self.leaves[i]) for i in self.smooth]

    @cached_property
    def examples(self) -> list[Arrays]:
        """The arguments, and others near them: in the rule's domain wherever the arguments are."""
        rng = generator(2)
        others = [
            [nearby(rng, leaf) if i in self.smooth else leaf for i, leaf in enumerate(self.leaves)]
            for _ in range(BATCH - 1)
        ]
        return [self.leaves, *others]

    @cached_property
    def batch_cotangents(self) -> list[Arrays]:
        """A cotangent for every example."""
        return [self.random_results(10 + b) for b in range(BATCH)]

    def chosen(self, which: Sequence[int]) -> str:
        """Arguments by name, for messages."""
        return ", ".join(repr(self.names[i]) for i in which)

    # --- the rule, called as a rule

    def pullback(
        self, leaves: Sequence[Any], cotangents: Arrays, needs: Sequence[int] | None = None
    ) -> dict[int, Any]:
        """The wanted cotangents by the rule's forward and backward, as they are: nothing is corrected."""
        bound = self.bind(leaves)
        _, tree, residuals, residual_tree = bound.forward(leaves)
        return self.backward(leaves, jax.tree.unflatten(residual_tree, residuals), tree, cotangents, needs)

    def backward(
        self,
        leaves: Sequence[Any],
        residuals: Any,
        result_tree: Any,
        cotangents: Arrays,
        needs: Sequence[int] | None = None,
    ) -> dict[int, Any]:
        """The wanted cotangents by the rule's backward alone."""
        bound = self.bind(leaves)
        wanted = self.smooth if needs is None else needs
        flags = [i in wanted for i in range(len(leaves))]
        full: Arrays = [_jax.zero_tangent(result) for result in self.results]
        for i, cotangent in zip(self.smooth_results, cotangents, strict=True):
            full[i] = cotangent
        full_tree = jax.tree.unflatten(result_tree, full)
        flags_tree = jax.tree.unflatten(self.tree, flags)
        returned = self.rule.backward(residuals, full_tree, flags_tree, **bound.options)
        try:
            if not isinstance(returned, tuple | list):
                raise ValueError("not a tuple")
            found = self.tree.flatten_up_to(tuple(returned))
            if not all(found[i] is None or hasattr(found[i], "dtype") for i in wanted):
                raise ValueError("not arrays")
        except ValueError:
            # The same call as the engine makes: its error names the argument that is wrong.
            bound.backward(residuals, full_tree, flags, [jax.typeof(x) for x in leaves])
            raise
        zeros = {i: np.zeros(leaves[i].shape, leaves[i].dtype) for i in wanted if found[i] is None}
        return {i: zeros.get(i, found[i]) for i in wanted}

    # --- derivatives by JAX, of the plain or of the attached function

    @cached_property
    def evaluate(self) -> Callable[[Arrays, Arrays], tuple[Arrays, Arrays]]:
        """Results and cotangents of the plain function, compiled: the oracle."""
        return jax.jit(partial(self.vjp, self.plain))

    @cached_property
    def expected_results(self) -> Arrays:
        """The results of the plain function."""
        return self.evaluate(self.leaves, self.cotangents)[0]

    @cached_property
    def expected(self) -> dict[int, Any]:
        """The cotangents of all smooth arguments by autodiff of the plain function."""
        return dict(zip(self.smooth, self.evaluate(self.leaves, self.cotangents)[1], strict=True))

    @cached_property
    def expected_examples(self) -> list[tuple[Arrays, dict[int, Any]]]:
        """Results and cotangents of every example, one after the other."""
        pairs = zip(self.examples, self.batch_cotangents, strict=True)
        each = [self.evaluate(leaves, cotangents) for leaves, cotangents in pairs]
        return [(results, dict(zip(self.smooth, cts, strict=True))) for results, cts in each]

    def vjp(
        self,
        function: Callable[..., Arrays],
        leaves: Sequence[Any],
        cotangents: Arrays,
        wrt: Sequence[int] | None = None,
    ) -> tuple[Arrays, Arrays]:
        """All results of a function and the cotangents of some of its arguments, by `jax.vjp`."""
        which = self.smooth if wrt is None else wrt

        def of_chosen(*chosen: Any) -> tuple[Arrays, Arrays]:
            results = function(*self.with_arguments(leaves, which, chosen))
            return [results[i] for i in self.smooth_results], results

        pullback_of: Any = jax.vjp
        _, pullback, results = pullback_of(of_chosen, *[leaves[i] for i in which], has_aux=True)
        return results, list(pullback(cotangents))

    def jvp(
        self, function: Callable[..., Arrays], leaves: Sequence[Any], tangents: Arrays, wrt: Sequence[int]
    ) -> Arrays:
        """The tangents of the smooth results, with some arguments perturbed."""

        def of_chosen(*chosen: Any) -> Arrays:
            results = function(*self.with_arguments(leaves, wrt, chosen))
            return [results[i] for i in self.smooth_results]

        return jax.jvp(of_chosen, [leaves[i] for i in wrt], tangents)[1]

    @staticmethod
    def with_arguments(leaves: Sequence[Any], which: Sequence[int], values: Sequence[Any]) -> Arrays:
        """The arguments with some replaced."""
        full = list(leaves)
        for i, value in zip(which, values, strict=True):
            full[i] = value
        return full

    # --- claims

    def result_claims(self, where: str, actual: Sequence[Any], expected: Sequence[Any]) -> Iterator[Claim]:
        """Claim that all results are right."""
        several = len(expected) > 1
        for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
            what = f"result {i}" if several else "result"
            yield self.claim(where, what, a, e, expected, dtype=e.dtype)

    def cotangent_claims(
        self, where: str, actual: Mapping[int, Any], expected: Mapping[int, Any]
    ) -> Iterator[Claim]:
        """Claim that the cotangents are right, and have the dtypes of their arguments."""
        labels = {i: f"cotangent of argument {self.names[i]!r}" for i in expected}
        others = {labels[i]: value for i, value in expected.items()}
        for i, value in actual.items():
            claim = self.claim(
                where, labels[i], value, expected[i], list(expected.values()), expected[i].dtype
            )
            yield replace(claim, others=others)

    def claim(
        self, where: str, what: str, actual: Any, expected: Any, beside: Sequence[Any], dtype: Any = None
    ) -> Claim:
        """One claim, whose absolute floor is in proportion to the values `beside` it."""
        floor = self.precision.absolute * max([1.0, *map(magnitude, beside)])
        return Claim(where, what, actual, expected, self.precision.relative, floor, dtype)


def generator(seed: int) -> np.random.Generator:
    """Random numbers that are not those of the arguments, which are often seeded with a small number too."""
    return np.random.default_rng([0x6672, seed])


def magnitude(x: Any) -> float:
    """The largest finite absolute value; zero for keys and empty arrays."""
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return 0.0
    values = np.abs(np.asarray(x))
    return float(np.max(values, initial=0.0, where=np.isfinite(values)))


def normal_like(rng: np.random.Generator, x: Any) -> Any:
    """Standard normal numbers with the shape and dtype of `x`."""
    values = rng.standard_normal(x.shape)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        values = values + 1j * rng.standard_normal(x.shape)
    return jnp.asarray(values.astype(x.dtype))


def nearby(rng: np.random.Generator, x: Any) -> Any:
    """Every entry changed by at most a tenth of itself, so that signs and zeros stay."""
    return jnp.asarray(np.asarray(x) * (1 + 0.1 * rng.uniform(-1, 1, x.shape)).astype(x.dtype))


def stack(xs: Sequence[Any]) -> Any:
    """Examples along a leading axis; by NumPy, because every shape would be one more program to compile."""
    if jnp.issubdtype(xs[0].dtype, jax.dtypes.prng_key):
        return jnp.stack(xs)
    return jnp.asarray(np.stack([np.asarray(x) for x in xs]))


def subsets(indices: Sequence[int], every_up_to: int) -> list[tuple[int, ...]]:
    """All non-empty subsets; of many indices only the singles, the pairs and the whole."""
    sizes = range(1, len(indices) + 1) if len(indices) <= every_up_to else (1, 2, len(indices))
    return [subset for size in sizes for subset in combinations(indices, size)]


def cast(x: Any, real: Any) -> Any:
    """`x` in another precision: `real` or the complex dtype of its width; keys and integers as they are."""
    dtype = jax.typeof(x).dtype
    if not jnp.issubdtype(dtype, jnp.inexact):
        return jnp.asarray(x)
    dtype = jnp.promote_types(real, jnp.complex64) if jnp.iscomplexobj(x) else np.dtype(real)
    return jnp.asarray(np.asarray(x).astype(dtype))


def make_case(
    operator: Layer | Rule,
    args: Sequence[Any],
    static: dict[str, Any],
    *,
    rule: Rule | None,
    function: Callable[..., Any] | None,
    primitive: str | None,
    tolerance: float | None,
) -> RuleCase:
    """The case in double precision; see `check_rule` for the arguments."""
    if isinstance(operator, Layer):
        layer, rule = operator, operator.rule if rule is None else rule
        if rule is None:
            raise ValueError(f"check_rule: layer {layer.name} has no rule; pass one as `rule=`.")
        if function is not None or primitive is not None:
            raise ValueError("check_rule: `function` and `primitive` belong to a rule, not to a layer.")
        bound = layer.signature.bind(*args, **static)
        bound.apply_defaults()
        args, static = bound.args, bound.kwargs
    else:
        if not isinstance(operator, Rule) or function is None or rule is not None:
            raise ValueError(
                "check_rule: pass a layer, or a rule with the plain function that it differentiates "
                "(`check_rule(rule, x, function=jax.lax.tanh)`)."
            )
        layer, rule = Layer(function), operator
    leaves, tree = jax.tree.flatten(tuple(args))
    call = LayerCall(layer, tuple(sorted(static.items())), tree)
    names = call.argument_names()
    for leaf, name in zip(leaves, names, strict=True):
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | int | float | complex):
            raise ValueError(
                f"check_rule: argument {name}={leaf!r} is not an array; pass static arguments by keyword."
            )

    def plain(*values: Any) -> Arrays:
        return [jnp.asarray(y) for y in jax.tree.leaves(call.plain(*values))]

    case = RuleCase(
        rule,
        layer.name if primitive is None else primitive,
        plain,
        lambda _: static,
        tree,
        names,
        [cast(leaf, jnp.float64) for leaf in leaves],
    )
    if primitive is not None:
        parameters = partial(_primitive_parameters, plain, primitive)
        rules = autodiff.replace({primitive: rule})
        case = replace(case, parameters=parameters, operator=plain, rules=rules)
    elif isinstance(operator, Layer):

        def call_layer(*values: Any) -> Arrays:
            return jax.tree.leaves(layer(*call.unflatten(values), **static))

        case = replace(case, operator=call_layer, rules=autodiff.replace({layer: rule}))
    if tolerance is not None:
        case = replace(case, precision=Tolerances.of_tolerance(tolerance))
    if not case.smooth or not case.smooth_results:
        what = "argument" if not case.smooth else "result"
        raise ValueError(f"check_rule: {case.subject} has no differentiable {what}; nothing can be checked.")
    return case


def _primitive_parameters(plain: Callable[..., Any], primitive: str, leaves: Sequence[Any]) -> dict[str, Any]:
    """The parameters of the one equation that the plain function is."""
    body = _jax.open_jaxpr(jax.make_jaxpr(plain)(*leaves))
    while len(body.eqns) == 1 and body.eqns[0].primitive.name == _jax.JIT:
        body = _jax.open_jaxpr(body.eqns[0].params["jaxpr"])
    eqn = body.eqns[0] if len(body.eqns) == 1 else None
    if eqn is None or eqn.primitive.name != primitive or list(eqn.invars) != list(body.invars):
        raise ValueError(
            f"check_rule: function must be the primitive {primitive!r} on its operands and nothing else, but "
            f"it is {body}; pass the `jax.lax` function with its operands as positional arguments."
        )
    return dict(eqn.params)
