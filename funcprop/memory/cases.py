"""The programs of a function whose memory is accounted: as it is, its gradient, a train step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import optax

from funcprop import _jax
from funcprop.graph.objective import differentiable, positions
from funcprop.graph.tracing import Arguments, argument_names
from funcprop.memory.accounted_program import AccountedProgram, purposes_in_step
from funcprop.memory.ledger import Category
from funcprop.program.call import Call, is_array, pair, traced
from funcprop.rules.rule_set import RuleSet
from funcprop.rules.running import with_rules
from funcprop.rules.sets import chosen_rules

Kind: TypeAlias = Literal["loss", "prediction", "step"]
KINDS: tuple[Kind, ...] = Kind.__args__  # type: ignore[attr-defined]


@dataclass(frozen=True, eq=False)
class Subject:
    """A call of the user's function, and what of it is differentiated.

    `inference` is the function itself; `result` is how many results are its own, the others being auxiliary.
    """

    call: Call
    fun: Callable[..., Any]
    signature: Arguments
    argnums: int | tuple[int, ...] | None
    chosen: tuple[int, ...]
    names: Sequence[str]
    has_aux: bool
    has_state: bool
    rules: RuleSet
    inference: AccountedProgram
    results: Sequence[Any]

    @classmethod
    def of(
        cls,
        fun: Callable[..., Any],
        args: Any,
        kwargs: Mapping[str, Any],
        argnums: Any,
        has_aux: bool,
        rules: RuleSet | None,
        signature: Arguments | None,
    ) -> Subject:
        """Trace the function. With a signature it returns the new state of models besides."""
        call = Call.of(args, kwargs, is_array)
        has_state = signature is not None
        signature = signature or Arguments.of(call)
        at = None if argnums is None else positions(argnums)
        chosen = differentiable(signature, call.variables, call.leaves, at)
        names = argument_names(fun, [signature.paths[i] for i in call.variables])
        own: list[int] = []

        def flat(*values: Any) -> list[Any]:
            call_args, call_kwargs = call.arguments(call.filled(values))
            returned = fun(*call_args, **call_kwargs)
            result, rest = _split(returned, has_aux, has_state, fun)
            arrays = _arrays(result)
            if not arrays and (other := jax.tree.leaves(result)):
                raise TypeError(
                    f"{getattr(fun, '__name__', type(fun).__name__)} returns {other[0]!r} of type "
                    f"{type(other[0]).__name__}, which is no array; return arrays."
                )
            own[:] = [len(arrays)]
            return [*arrays, *_arrays(rest)]

        jaxpr = traced(flat, call.values, fun)
        purposes: list[Category] = ["parameters" if i in chosen else "inputs" for i in call.variables]
        shardings = [_jax.sharding_of(call.leaves[i]) for i in call.variables]
        inference = AccountedProgram(jaxpr, names, purposes, shardings)
        results = [v.aval for v in _jax.open_jaxpr(jaxpr).outvars[: own[0]]]
        resolved = chosen_rules(rules).for_arguments(call.leaves)
        return cls(call, fun, signature, at, chosen, names, has_aux, has_state, resolved, inference, results)

    @property
    def label(self) -> str:
        """The function's name."""
        return getattr(self.fun, "__name__", type(self.fun).__name__)

    @property
    def kind(self) -> Kind:
        """A loss returns one real scalar; a train step contains a backward sweep."""
        if (
            len(self.results) == 1
            and self.results[0].shape == ()
            and jnp.issubdtype(self.results[0].dtype, jnp.floating)
        ):
            return "loss"
        backward = (e for e in _jax.equations(self.inference.jaxpr) if "transpose(" in _jax.scope(e))
        return "prediction" if next(backward, None) is None else "step"

    # --- training -----------------------------------------------------------------------------

    def gradient(self) -> AccountedProgram | None:
        """Value and gradient of a loss; results and pullback of anything else; None if nothing is smooth."""
        others = [i for i in self.call.variables if i not in self.chosen]
        smooth = [t for t in self.results if _jax.is_differentiable(t)]
        if not self.chosen or not smooth:
            return None
        is_loss = self.kind == "loss"

        def program(chosen: list[Any], others: list[Any], seeds: list[Any]) -> Any:
            function = with_rules(self._of_chosen, self.rules)
            values, pullback, rest = jax.vjp(lambda c: function(c, others), chosen, has_aux=True)
            smooth = [jnp.ones((), values[0].dtype)] if is_loss else seeds
            return _arrays((values, rest, pullback(_jax.with_zero_tangents(smooth, self.results))))

        seeds = [] if is_loss else [jax.ShapeDtypeStruct(t.shape, t.dtype) for t in smooth]
        case = self._case(program, others, [("∂J/∂result", "inputs", t) for t in seeds])
        return _ending_in(case, [(f"∂J/∂{name}", "gradients") for name in case.names[: len(self.chosen)]])

    def step(self, optimizer: optax.GradientTransformation, donate: bool) -> AccountedProgram | None:
        """A step of an optimizer on a loss: new parameters, new state, value."""
        others = [i for i in self.call.variables if i not in self.chosen]
        if not self.chosen:
            return None
        if self.kind != "loss":
            shapes = ", ".join(str(t) for t in self.results)
            raise TypeError(
                f"{self.label} returns ({shapes}), but optimizer= needs the gradient of one real scalar; "
                "return the loss, other results as auxiliary data (has_aux), or leave optimizer= out."
            )
        state = jax.eval_shape(optimizer.init, self._tree([self._type(i) for i in self.chosen]))
        state_leaves, state_tree = jax.tree.flatten_with_path(state)

        def program(chosen: list[Any], others: list[Any], state: list[Any]) -> Any:
            function = with_rules(self._of_chosen, self.rules)
            gradient = jax.value_and_grad(lambda c: _first(function(c, others)), has_aux=True)
            (value, rest), found = gradient(chosen)
            with jax.named_scope("optimizer"):
                parameters = self._tree(chosen)
                updates, new_state = optimizer.update(
                    self._tree(found), jax.tree.unflatten(state_tree, state), parameters
                )
                updated = optax.apply_updates(parameters, updates)
            return _arrays((updated, new_state, value, rest))

        kept: list[tuple[str, Category, Any]] = [
            ("state/" + jax.tree_util.keystr(path, simple=True, separator="/"), "optimizer state", leaf)
            for path, leaf in state_leaves
        ]
        case = self._case(program, others, kept)
        count, own = len(self.chosen), len(case.names) - len(kept)
        carried = [*range(count), *range(own, own + len(kept))]
        new: list[tuple[str, Category]] = [(f"new {case.names[i]}", case.categories[i]) for i in carried]
        return replace(case, results=new, donated=frozenset(carried if donate else ()))

    def whole_step(self) -> AccountedProgram:
        """The user's own train step, with what it donates."""
        jaxpr = _jax.open_jaxpr(self.inference.jaxpr)
        donated = frozenset(
            jaxpr.invars.index(v)
            for eqn in jaxpr.eqns
            for v, gives in zip(eqn.invars, eqn.params.get("donated_invars", ()), strict=False)
            if gives and v in jaxpr.invars
        )
        return replace(self.inference, categories=purposes_in_step(self.inference.jaxpr), donated=donated)

    def _of_chosen(self, chosen: Sequence[Any], others: Sequence[Any]) -> tuple[list[Any], Any]:
        """The function's own results, and the others, of its arrays."""
        leaves = list(self.call.leaves)
        rest = [i for i in self.call.variables if i not in self.chosen]
        for i, value in [*zip(self.chosen, chosen, strict=True), *zip(rest, others, strict=True)]:
            leaves[i] = value
        call_args, call_kwargs = self.call.arguments(leaves)
        returned = self.fun(*call_args, **call_kwargs)
        result, extra = _split(returned, self.has_aux, self.has_state, self.fun)
        return _arrays(result), _arrays(extra)

    def _tree(self, chosen: Sequence[Any]) -> Any:
        """The differentiated arrays in the structure of their arguments."""
        leaves: list[Any] = [None] * len(self.call.leaves)
        for i, value in zip(self.chosen, chosen, strict=True):
            leaves[i] = value
        arguments = self.signature.positional(leaves)
        if self.argnums is None:
            return tuple(arguments)
        if isinstance(self.argnums, int):
            return arguments[self.argnums]
        return tuple(arguments[p] for p in self.argnums)

    def _type(self, i: int) -> jax.ShapeDtypeStruct:
        value = self.call.leaves[i]
        return jax.ShapeDtypeStruct(jnp.shape(value), jnp.result_type(value))

    def _case(
        self,
        program: Callable[[list[Any], list[Any], list[Any]], Any],
        others: Sequence[int],
        more: Sequence[tuple[str, Category, Any]],
    ) -> AccountedProgram:
        """A program of what is differentiated, the other arguments and further ones."""
        name = dict(zip(self.call.variables, self.names, strict=True))
        given = [self._type(i) for i in self.chosen], [self._type(i) for i in others], [t for *_, t in more]

        def flat(*values: Any) -> Any:
            first, second = len(self.chosen), len(self.chosen) + len(others)
            return program(list(values[:first]), list(values[first:second]), list(values[second:]))

        jaxpr = traced(flat, [t for part in given for t in part], self.fun)
        names = [*(name[i] for i in (*self.chosen, *others)), *(label for label, _, _ in more)]
        purposes: list[Category] = ["parameters" for _ in self.chosen]
        purposes += ["inputs" for _ in others]
        purposes += [category for _, category, _ in more]
        shardings = [_jax.sharding_of(self.call.leaves[i]) for i in (*self.chosen, *others)]
        # State that `optimizer.init` makes of a parameter lies where the parameter lies.
        like = {name[i]: (t.shape, s) for i, t, s in zip(self.chosen, given[0], shardings, strict=False)}
        for label, _, t in more:
            owner = max((n for n in like if label.endswith(f"/{n}")), key=len, default=None)
            shape, sharding = like[owner] if owner is not None else (None, None)
            shardings.append(sharding if shape == t.shape else None)
        return AccountedProgram(jaxpr, names, purposes, shardings)


def _ending_in(case: AccountedProgram, last: Sequence[tuple[str, Category]]) -> AccountedProgram:
    """The case with names and purposes of its last results."""
    before = len(_jax.open_jaxpr(case.jaxpr).outvars) - len(last)
    return replace(case, results=[*((f"result {j}", "results") for j in range(before)), *last])


def _first(returned: tuple[list[Any], Any]) -> tuple[Any, Any]:
    return returned[0][0], returned[1]


def _split(returned: Any, has_aux: bool, has_state: bool, fun: Callable[..., Any]) -> tuple[Any, Any]:
    """The function's own result, and auxiliary data with the new state of models."""
    own, state = returned if has_state else (returned, None)
    result, aux = pair(own, fun) if has_aux else (own, None)
    return result, (aux, state)


def _arrays(tree: Any) -> list[Any]:
    return [x for x in jax.tree.leaves(tree) if isinstance(x, jax.core.Tracer) or is_array(x)]
