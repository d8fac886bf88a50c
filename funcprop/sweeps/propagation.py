"""What both sweeps computed, by name: values, gradients, contributions, and what is not finite."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from funcprop import _jax
from funcprop.graph.graph import Graph, Operator
from funcprop.rules.rewrite import Rewriter
from funcprop.rules.rule_set import RuleSet
from funcprop.sweeps.activity import active_variables
from funcprop.sweeps.nonfinite import Moment, NonFinite, first_nonfinite
from funcprop.sweeps.sweeps import Cotangents, Tape, Values, backward_sweep, cotangent_of


class Named(Mapping[str, Any]):
    """Arrays by name, in the order of a sweep.

    A name may be shortened to any suffix that is unique (`hidden/z` or `z` for `net/hidden/z`); the name of a
    scope means the last value computed in it. Values inside a loop have a leading axis for its iterations.
    `others` can be looked up but are not listed; they are computed when they are asked for.
    """

    def __init__(
        self,
        listed: Mapping[str, Any],
        others: Collection[str],
        compute: Callable[[str], Any],
        scopes: Mapping[str, str],
    ) -> None:
        self._listed = dict(listed)
        self._compute = compute
        self._all = dict.fromkeys([*listed, *others])
        self._scopes = dict(scopes)

    def resolve(self, name: str) -> str:
        """The full name that `name` stands for.

        Raises:
            KeyError: there is no such name, or several.
        """
        if name in self._all:
            return name
        if name in self._scopes and self._scopes[name] in self._all:
            return self._scopes[name]
        for candidates in (self._all, self._scopes):
            found = [full for full in candidates if full.endswith(f"/{name}")]
            if len(found) == 1:
                return self._scopes.get(found[0], found[0]) if candidates is self._scopes else found[0]
            if len(found) > 1:
                raise KeyError(f"{name!r} is ambiguous: {', '.join(found[:8])}; use a longer name.")
        near = difflib.get_close_matches(name, [*self._all, *self._scopes], n=5, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}?" if near else f"there are: {', '.join(self._all)}."
        raise KeyError(f"no value named {name!r}; {hint}")

    def __getitem__(self, name: str) -> Any:
        full = self.resolve(name)
        return self._listed[full] if full in self._listed else self._compute(full)

    def __iter__(self) -> Iterator[str]:
        return iter(self._listed)

    def __len__(self) -> int:
        return len(self._listed)

    def __contains__(self, name: object) -> bool:
        try:
            return isinstance(name, str) and self.resolve(name) in self._all
        except KeyError:
            return False

    def __repr__(self) -> str:
        return f"Named({', '.join(self)})"


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True, eq=False)
class Propagation:
    """The outcome of both sweeps: every value and cotangent by name. A pytree, so it can leave a `jit`.

    `table` tells it as text, where it can: by the equations, which are not known here.
    """

    graph: Graph
    value: Any
    gradient: Any
    tape: Tape
    cotangents: Cotangents
    rules: RuleSet
    active: frozenset[str]
    aux: Any = None
    table: Callable[[Propagation], str | None] | None = None

    def __repr__(self) -> str:
        return (
            f"both sweeps of {self.graph.name}: .values[…] has {len(self.values)} values by their names, "
            f".gradients[…] {len(self.gradients)} gradients"
        )

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Arrays, and what is known without them."""
        return (self.value, self.gradient, self.tape, self.cotangents, self.aux), (
            self.graph,
            self.rules,
            self.active,
            self.table,
        )

    @classmethod
    def tree_unflatten(cls, static: tuple[Any, ...], children: tuple[Any, ...]) -> Propagation:
        """The inverse of `tree_flatten`."""
        graph, rules, active, table = static
        value, gradient, tape, cotangents, aux = children
        return cls(graph, value, gradient, tape, cotangents, rules, active, aux, table)

    @property
    def values(self) -> Named:
        """Every value of the forward sweep, in its order. Inputs are found by name but not listed."""
        listed: dict[str, Any] = {}
        _collect_values(self.graph, self.tape, "", listed)
        given = [v.name for v in (*self.graph.inputs, *self.graph.constants)]
        return Named(listed, given, self.tape.values.__getitem__, _scopes(self.graph, ""))

    @property
    def gradients(self) -> Named:
        """`∂J/∂v`, in the order in which the backward sweep completes them.

        Listed are the differentiated arguments and everything between them and the result; the gradient of
        any other variable is computed from the tape when it is asked for.
        """
        (result,) = self.graph.outputs
        listed: dict[str, Any] = {}
        _collect_cotangents(self.graph, self.cotangents, "", listed)
        listed.pop(result.name, None)
        smooth = [v.name for v in self.graph.variables if _jax.is_differentiable(v.aval)]
        others = [name for name in smooth if name not in listed]
        return Named(listed, others, self._further_gradient, _scopes(self.graph, ""))

    def _further_gradient(self, name: str) -> Any:
        active = active_variables(self.graph, {name}, Rewriter(self.rules))
        seeds = {v.name: self.cotangents.values[v.name] for v in self.graph.outputs}
        found = backward_sweep(self.graph, self.tape, seeds, active, self.rules)
        variable = next(v for v in self.graph.variables if v.name == name)
        return cotangent_of(variable, self.tape.values[name], found.values)

    @property
    def contributions(self) -> Contributions:
        """The contribution of each variable to the gradient of another; see `Contributions`."""
        return Contributions(self)

    def first_nonfinite(self) -> NonFinite | None:
        """Find what made the value or the gradient not finite; None if every entry of both is finite.

        It is the first value of the forward sweep that is not finite and from which such values lead to the
        result, or to the operator that sends back the first bad cotangent; or else that cotangent. (The −∞ of
        a mask, or with which a maximum begins, does no harm where the next operator removes it.) First in the
        order in which the sweeps compute: in a loop iteration by iteration, and backwards from the last
        iteration to the first. Needs concrete arrays: call it outside `jit`.

        Raises:
            ValueError: several propagations are stacked in this one, by `vmap`.
        """
        (result,) = self.graph.outputs
        shape = jnp.shape(self.cotangents.values[result.name])
        if shape != ():
            raise ValueError(
                f"first_nonfinite: this propagation is stacked by vmap over axes {shape}, and the order is "
                "that of one example; pick one by `jax.tree.map(lambda a: a[i], propagation)`."
            )
        whole = Moment(self.graph, self.tape, self.cotangents, self.active, self.rules)
        return first_nonfinite(whole, (self.value, self.gradient))

    def __str__(self) -> str:
        if self.table is not None and (told := self.table(self)) is not None:
            return told
        gradients = self.gradients
        listed = set(gradients)
        rows = [f"{'variable':24} {'shape':>14} {'‖value‖':>12} {'‖∂J/∂v‖':>12}"]
        for name, value in {
            **{v.name: self.tape.values[v.name] for v in self.graph.inputs},
            **self.values,
        }.items():
            gradient = norm_text(gradients[name]) if name in listed else "-"
            rows.append(f"{name:24} {jnp.shape(value)!s:>14} {norm_text(value):>12} {gradient:>12}")
        return "\n".join(rows)


class Contributions(Mapping[tuple[str, str], Any]):
    """`contributions[source, target]`: the part of `∂J/∂target` that arrives by way of `source`.

    It is `prod(∂J/∂source, ∂source/∂target)`, taken along every path from `target` to `source` that meets no
    other named variable. Summed over the sources it is the gradient of `target`. For the chapter's model,
    `contributions["s", "W1"]` is `λ W1`.
    """

    def __init__(self, propagation: Propagation) -> None:
        self._of = propagation
        self._variables = {v.name: v for v in propagation.graph.variables}

    def __getitem__(self, pair: tuple[str, str]) -> Any:
        of = self._of
        source, target = (self._resolve(name) for name in pair)
        seed = of.cotangents.values.get(source)
        if seed is None:
            raise KeyError(f"no cotangent reaches {source!r}, so it contributes to nothing.")
        stop = {v.name for v in self._variables.values() if v.named} - {source}
        found = backward_sweep(of.graph, of.tape, {source: seed}, of.active, of.rules, stop)
        if target == source or target not in found.values:
            near = ", ".join(s for s, t in self if t == target)
            raise KeyError(
                f"{source!r} contributes nothing directly to {target!r}; contributions to {target!r} come "
                f"from: {near or 'nowhere'}."
            )
        return found.values[target]

    def _resolve(self, name: str) -> str:
        full = self._of.values.resolve(name)
        if full not in self._variables:
            raise KeyError(
                f"{full!r} is inside a loop; contributions are between variables outside of loops."
            )
        return full

    def __iter__(self) -> Iterator[tuple[str, str]]:
        graph, active = self._of.graph, self._of.active
        # For each variable, the named variables that it reaches without meeting another named one.
        reached_by: dict[str, dict[str, None]] = {v.name: {} for v in graph.variables}
        for op in reversed(graph.operators):
            sources: dict[str, None] = {}
            for v in op.outputs:
                ends = v.named or v in graph.outputs
                sources.update({v.name: None} if ends else reached_by[v.name])
            for v in op.inputs:
                if v.kind != "literal" and v.name in active:
                    reached_by[v.name].update(sources)
        for target in self._of.gradients:
            if target in self._variables and self._variables[target].named:
                yield from ((s, target) for s in reached_by[target] if s in self._of.cotangents.values)

    def __len__(self) -> int:
        return sum(1 for _ in self)


# --- names ------------------------------------------------------------------------------------


def _origins(graph: Graph, prefix: str) -> Iterator[tuple[Operator, str]]:
    """Every operator, those in loops too, with the full name of each of its results."""
    for op in graph.operators:
        for v in op.outputs:
            yield op, prefix + v.name
        if op.op == "scan":
            yield from _origins(op.bodies["jaxpr"], f"{prefix}{op.name}/")


def _scopes(graph: Graph, prefix: str) -> dict[str, str]:
    """For every named scope, the last variable that is computed in it."""
    last: dict[str, str] = {}
    for op, name in _origins(graph, prefix):
        scope = name[: len(name) - len(op.outputs[0].name)] + op.scope if op.outputs else ""
        parts = scope.split("/")
        for depth in range(1, len(parts) + 1):
            last["/".join(parts[:depth])] = name
    return {scope: name for scope, name in last.items() if scope}


def _collect_values(graph: Graph, tape: Tape, prefix: str, into: Values) -> None:
    for op in graph.operators:
        if op.name in tape.bodies:
            _collect_values(op.bodies["jaxpr"], tape.bodies[op.name], f"{prefix}{op.name}/", into)
        into.update({prefix + v.name: tape.values[v.name] for v in op.outputs})


def completion_order(graph: Graph) -> Iterator[str]:
    """The graph's variables in the order in which the backward sweep completes their cotangents.

    A cotangent is complete when the first operator that uses the variable has been visited.
    """
    first_use = {v.name: op for op in reversed(graph.operators) for v in op.inputs if v.kind != "literal"}
    for op in reversed(graph.operators):
        yield from dict.fromkeys(v.name for v in op.inputs if first_use.get(v.name) is op)


def _collect_cotangents(graph: Graph, cotangents: Cotangents, prefix: str, into: Values) -> None:
    """Cotangents in the order of the backward sweep, those inside loops where the loop is visited."""
    first_use = {v.name: op for op in reversed(graph.operators) for v in op.inputs}
    into.update(
        {prefix + v.name: cotangents.values[v.name] for v in graph.outputs if v.name in cotangents.values}
    )
    completed = list(completion_order(graph))
    for op in reversed(graph.operators):
        if op.name in cotangents.bodies:
            body = op.bodies["jaxpr"]
            inner: Values = {}
            _collect_cotangents(body, cotangents.bodies[op.name], "", inner)
            given = {v.name for v in (*body.inputs, *body.constants)}
            into.update({f"{prefix}{op.name}/{k}": ct for k, ct in inner.items() if k not in given})
        for name in completed:
            if first_use[name] is op and name in cotangents.values:
                into[prefix + name] = cotangents.values[name]
    unused = [v.name for v in graph.inputs if v.name not in first_use]
    into.update({prefix + name: cotangents.values[name] for name in unused if name in cotangents.values})


def norm_text(value: Any) -> str:
    """The Euclidean norm of all entries, the value of one integer, or a dash."""
    if _jax.is_differentiable(jax.typeof(value)):
        return f"{float(jnp.linalg.norm(jnp.ravel(value))):.5g}"
    is_number = not jnp.issubdtype(jax.typeof(value).dtype, jax.dtypes.extended)
    return str(value) if is_number and jnp.ndim(value) == 0 else "-"
