"""`trace(fun)(*args)`: from a function to its graph.

The function is traced to a jaxpr. Nested jits are inlined, layers kept whole, names and scopes collected, and
equations that share a mutable reference grouped, because between them order is meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from funcprop import _jax
from funcprop._jax import nnx
from funcprop.graph.graph import Graph, Kind, Operator, Variable, name
from funcprop.graph.naming import argument_names, joined, literal_name, unique_names, without_transformations
from funcprop.graph.references import contents
from funcprop.program.call import Call, is_array, pair, traced
from funcprop.program.facts import CALLS
from funcprop.program.flops import flops
from funcprop.program.layer_calls import LayerCall, boundary_p, layer_call
from funcprop.program.sizes import nbytes


@dataclass(frozen=True, eq=False)
class Traced:
    """A graph with what is needed to run it: constants, and where arguments and results belong.

    `leaves` are the arguments' arrays and other values, those at `arguments` the graph's inputs. `extra` are
    the results that are not differentiated: auxiliary ones and the new state of models. `kept` are those
    among them that are no arrays of the graph, None in the place of each that is.
    """

    graph: Graph
    constants: tuple[Any, ...]
    arguments: tuple[int, ...]
    leaves: tuple[Any, ...]
    signature: Arguments
    result_tree: Any
    extra: tuple[Variable, ...] = ()
    extra_tree: Any = None
    kept: tuple[tuple[Any] | None, ...] = ()

    def extras(self, values: Mapping[str, Any]) -> tuple[Any, Any]:
        """The auxiliary results and the new state of models, from the values of the graph."""
        computed = iter([v.value if v.kind == "literal" else values[v.name] for v in self.extra])
        leaves = [next(computed) if kept is None else kept[0] for kept in self.kept]
        return jax.tree.unflatten(self.extra_tree, leaves)

    def values(self) -> dict[str, Any]:
        """The values of the graph's inputs and constants, by name; of references, what they hold."""
        return {variable: contents(x) for variable, x in self._given()}

    def _given(self) -> Iterator[tuple[str, Any]]:
        leaves = (self.leaves[i] for i in self.arguments)
        yield from zip([v.name for v in self.graph.inputs], leaves, strict=True)
        yield from zip([v.name for v in self.graph.constants], self.constants, strict=True)

    def write(self, contents: Mapping[str, Any]) -> None:
        """Give the references among the inputs and constants their new contents, by name."""
        for variable, x in self._given():
            if variable in contents:
                x[...] = contents[variable]


@dataclass(frozen=True, eq=False)
class Arguments:
    """Where the leaves of a call stand among the arguments.

    `paths` begin with 0 and a position, or 1 and a keyword; `trainable` are those that count as parameters of
    what they belong to; `positional` puts leaves back together, as the list of positional arguments.
    """

    paths: Sequence[Any]
    trainable: Sequence[bool]
    positional: Callable[[Sequence[Any]], Sequence[Any]]

    @classmethod
    def of(cls, call: Call) -> Arguments:
        """Describe the arguments of a call as it is written."""
        paths = [path for path, _ in jax.tree.leaves_with_path(call.arguments(call.leaves))]
        return cls(paths, [True] * len(paths), lambda leaves: call.arguments(leaves)[0])


def trace(fun: Callable[..., Any]) -> Callable[..., Graph]:
    """The computational graph of `fun` at given arguments: `trace(fun)(*args, **kwargs) -> Graph`.

    Arrays, `jax.ShapeDtypeStruct`s and python floats are variables of the graph; everything else (ints,
    strings, objects) stays what it is. Nothing is computed.

    Raises:
        whatever `fun` raises when it is traced.

    Example:
        >>> import jax, jax.numpy as jnp, funcprop as fp
        >>> graph = fp.trace(jnp.tanh)(jax.ShapeDtypeStruct((2,), "float32"))
        >>> [op.op for op in graph.operators]
        ['tanh']
    """

    def graph_of(*args: Any, **kwargs: Any) -> Graph:
        return trace_call(lambda found: (found.graph, None), fun, args, kwargs)

    return graph_of


def trace_call(
    use: Callable[[Traced], tuple[Any, Any]],
    fun: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    **options: Any,
) -> Any:
    """Trace a call whose arguments may be nnx models.

    `use(traced)` returns what is asked for, and the values of `traced.extra` in their structure, which are
    put into the models; None leaves the models alone. `options` are those of `trace_function`.
    """
    if not nnx.has_models((args, kwargs)):
        return use(trace_function(fun, args, kwargs, **options))[0]

    def run(pure: Callable[..., Any], arguments: tuple[Any, ...], _: Any) -> tuple[Any, Any]:
        signature = Arguments(*nnx.describe(args, kwargs, arguments))
        return use(trace_function(pure, arguments, {}, signature=signature, **options))

    return nnx.call(run, fun, args, dict(kwargs))


def trace_function(
    fun: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    inline: frozenset[str] = CALLS,
    signature: Arguments | None = None,
    name_result: str | None = None,
    has_aux: bool = False,
) -> Traced:
    """Trace a function into a graph, and keep the data that the sweeps need with it.

    With a `signature`, `fun` returns a pair, of which the second part is the state of models. With `has_aux`,
    its own result is a pair too, of the result and auxiliary data. `name_result` names a first
    result that no operator computes (an argument, a constant): an operator is added that gives it the name.
    """
    call = Call.of(args, kwargs, is_array)
    has_state = signature is not None
    if signature is None:
        signature = Arguments.of(call)
    result_trees: list[Any] = []

    def flat(*values: Any) -> Any:
        call_args, call_kwargs = call.arguments(call.filled(values))
        returned = fun(*call_args, **call_kwargs)
        own, state = returned if has_state else (returned, None)
        own, aux = pair(own, fun) if has_aux else (own, None)
        results, result_tree = jax.tree.flatten(own)
        others, extra_tree = jax.tree.flatten((aux, state))
        kept = tuple(None if isinstance(x, jax.core.Tracer) else (x,) for x in others)
        result_trees.append((result_tree, extra_tree, kept))
        return [*results, *(x for x, k in zip(others, kept, strict=True) if k is None)]

    # JAX's messages name the user's function, not this one.
    flat.__wrapped__ = fun  # type: ignore[attr-defined]
    closed = traced(flat, call.values, fun)
    names = argument_names(fun, [signature.paths[i] for i in call.variables])
    label = getattr(fun, "__name__", type(fun).__name__)
    graph, constants = _Builder(inline).build(label, closed, names)
    if name_result is not None and graph.outputs and graph.outputs[0].kind != "intermediate":

        def renamed(*values: Any) -> Any:
            first, *others = _jax.evaluate(_jax.open_jaxpr(closed), _jax.constants(closed), values)
            return [name(first, name_result), *others]

        graph, constants = _Builder(inline).build(label, _jax.retrace(renamed, closed), names)
    result_tree, extra_tree, kept = result_trees[-1]
    extra = graph.outputs[result_tree.num_leaves :]
    graph = replace(graph, outputs=graph.outputs[: result_tree.num_leaves])
    return Traced(
        graph, tuple(constants), call.variables, call.leaves, signature, result_tree, extra, extra_tree, kept
    )


def graph_of(label: str, closed: Any, inline: frozenset[str] = CALLS) -> Graph:
    """The graph of a jaxpr, whose inputs are called `in0`, `in1` …"""
    names = [f"in{i}" for i in range(len(_jax.open_jaxpr(closed).invars))]
    return _Builder(inline).build(label, closed, names)[0]


@dataclass(eq=False)
class _Draft:
    """A variable while the graph is built: its name may still come from a later equation."""

    aval: Any
    kind: Kind
    scope: str = ""
    label: str = ""
    named: bool = False
    value: Any = None


@dataclass(eq=False)
class _TracedOperator:
    """An operator while the graph is built."""

    jaxpr: Any
    call: LayerCall | None
    scope: str
    source: str | None
    inputs: list[_Draft]
    outputs: list[_Draft]


class _Builder:
    """Turns a jaxpr into a graph: inlines what is inlined, and names everything."""

    def __init__(self, inline: frozenset[str]) -> None:
        self.inline = inline

    def build(
        self, label: str, closed: Any, input_names: Sequence[str], source: str | None = None
    ) -> tuple[Graph, list[Any]]:
        """The graph and its constants; `source` is the line of the operator whose body this is."""
        jaxpr = _jax.open_jaxpr(closed)
        inputs = [
            _Draft(v.aval, "input", label=n, named=True)
            for v, n in zip(jaxpr.invars, input_names, strict=True)
        ]
        self.constants: list[tuple[_Draft, Any]] = []
        self.steps: list[_TracedOperator] = []
        outputs = self._walk(closed, inputs, "", source)
        computed = [draft for step in self.steps for draft in step.outputs]
        frozen = _freeze([*inputs, *(draft for draft, _ in self.constants), *computed])
        names = unique_names([joined(step.scope, _op(step)) for step in self.steps])
        operators = tuple(
            self._operator(step, label, frozen) for step, label in zip(self.steps, names, strict=True)
        )
        graph = Graph(
            label,
            tuple(frozen(d) for d in inputs),
            tuple(frozen(d) for d, _ in self.constants),
            operators,
            tuple(frozen(d) for d in outputs),
        )
        return graph, [value for _, value in self.constants]

    def _operator(self, step: _TracedOperator, label: str, frozen: Callable[[_Draft], Variable]) -> Operator:
        eqns = step.jaxpr.eqns
        bodies = {}
        if len(eqns) == 1 and step.call is None:
            for key, body in _jax.sub_jaxprs(eqns[0]):
                names = [f"in{i}" for i in range(len(_jax.open_jaxpr(body).invars))]
                bodies[key] = _Builder(self.inline).build(key, body, names, step.source)[0]
        return Operator(
            label,
            _op(step),
            step.scope,
            tuple(frozen(d) for d in step.inputs),
            tuple(frozen(d) for d in step.outputs),
            sum(map(flops, eqns)),
            step.source,
            bodies,
            step.call,
            step.jaxpr,
        )

    def _in_its_place(self, eqn: Any, operands: Sequence[_Draft]) -> Any | None:
        """The body that stands in an equation's place: of what is inlined, and a branch that is known."""
        if eqn.primitive.name in self.inline:
            ((_, body),) = _jax.sub_jaxprs(eqn)
            return body
        if eqn.primitive.name == "cond" and (index := self._known(operands[0])) is not None:
            return eqn.params["branches"][index]
        return None

    def _known(self, index: _Draft) -> int | None:
        """The number of a branch, if it is computed from literals alone."""
        if index.kind == "literal":
            return int(index.value)
        made = next((step for step in self.steps if index in step.outputs), None)
        if made is not None and made.jaxpr.eqns[0].primitive.name == "platform_index":
            # A kernel for Mosaic is never what this program is.
            platforms = made.jaxpr.eqns[0].params["platforms"]
            named = [name for group in platforms for name in group or ()]
            return platforms.index(None) if None in platforms and set(named) <= {"mosaic"} else None
        if made is None or made.jaxpr.eqns[0].primitive.name not in ("clamp", "convert_element_type"):
            return None
        if any(v.kind != "literal" for v in made.inputs):
            return None
        return int(_jax.evaluate(made.jaxpr, (), [v.value for v in made.inputs])[0])

    def _walk(self, closed: Any, inputs: Sequence[_Draft], prefix: str, around: str | None) -> list[_Draft]:
        """Append the steps of a jaxpr; `around` is the line that those without one of their own come from."""
        jaxpr = _jax.open_jaxpr(closed)
        env: dict[Any, _Draft] = dict(zip(jaxpr.invars, inputs, strict=True))
        for var, value in zip(jaxpr.constvars, _jax.array_constants(closed), strict=True):
            env[var] = _Draft(var.aval, "constant", prefix, "constant")
            self.constants.append((env[var], value))

        def read(atom: Any) -> _Draft:
            if isinstance(atom, _jax.Literal):
                return _Draft(atom.aval, "literal", label=literal_name(atom.val), value=atom.val)
            return env[atom]

        for eqns in _groups(jaxpr.eqns):
            eqn = eqns[0]
            scope = joined(prefix, without_transformations(_jax.scope(eqn), ("vmap",)))
            source = next(filter(None, (_jax.source_line(e, around) for e in eqns)), None)
            call = layer_call(eqn)
            if len(eqns) > 1 or any(map(_holds_reference, eqn.outvars)):
                free = _jax.free_variables(eqns)
                results = [v for v in _read_outside(eqns, jaxpr) if not _holds_reference(v)]
                drafts = [_Draft(v.aval, "intermediate", scope, "references") for v in results]
                group = _jax.jaxpr_of(eqns, free, results, "references")
                self.steps.append(_TracedOperator(group, None, scope, source, [env[v] for v in free], drafts))
                env.update(zip(results, drafts, strict=True))
                continue
            operands = [read(a) for a in eqn.invars]
            if eqn.primitive is boundary_p:
                # What is left of a layer that is not whole (it closes over a traced value).
                env.update(zip(eqn.outvars, operands[eqn.params["call"].tree.num_leaves :], strict=True))
            elif (
                eqn.primitive.name == "name" and operands[0].kind == "intermediate" and not operands[0].named
            ):
                operands[0].label, operands[0].named, operands[0].scope = eqn.params["name"], True, scope
                env[eqn.outvars[0]] = operands[0]
            elif call is None and (body := self._in_its_place(eqn, operands)) is not None:
                operands = operands[len(operands) - len(_jax.open_jaxpr(body).invars) :]
                env.update(zip(eqn.outvars, self._walk(body, operands, scope, source), strict=True))
            else:
                named = eqn.primitive.name == "name"
                label = eqn.params["name"] if named else _jax.function_name(eqn)
                label = label if call is None else call.layer.name
                drafts = [_Draft(v.aval, "intermediate", scope, label, named) for v in eqn.outvars]
                step = _TracedOperator(_jax.one_equation_jaxpr(eqn), call, scope, source, operands, drafts)
                self.steps.append(step)
                env.update(zip(eqn.outvars, drafts, strict=True))
        return [read(a) for a in jaxpr.outvars]


def _groups(eqns: Sequence[Any]) -> Iterator[list[Any]]:
    """Single equations; those between the first and last use of mutable references are one group.

    Between two uses of a reference, order is meaning: the group is differentiated as a whole.
    """
    touching = [i for i, e in enumerate(eqns) if any(map(_holds_reference, [*e.invars, *e.outvars]))]
    first, last = (touching[0], touching[-1]) if touching else (len(eqns), -1)
    yield from ([e] for e in eqns[:first])
    if touching:
        yield list(eqns[first : last + 1])
    yield from ([e] for e in eqns[max(last + 1, first) :] if touching)


def _read_outside(eqns: Sequence[Any], jaxpr: Any) -> list[Any]:
    """Find the results of a group of equations that the rest of its jaxpr reads."""
    inside = set(map(id, eqns))
    read = {v for e in jaxpr.eqns if id(e) not in inside for v in _jax.free_variables([e])}
    read |= {v for v in jaxpr.outvars if not isinstance(v, _jax.Literal)}
    return [v for e in eqns for v in e.outvars if v in read]


def _holds_reference(atom: Any) -> bool:
    return _jax.is_reference(atom.aval)


def _op(step: _TracedOperator) -> str:
    if len(step.jaxpr.eqns) > 1:
        return "references"
    return step.jaxpr.eqns[0].primitive.name if step.call is None else step.call.layer.name


def _freeze(drafts: Sequence[_Draft]) -> Callable[[_Draft], Variable]:
    """Give every variable its unique name; the result maps a draft to its variable."""
    done: dict[int, Variable] = {}
    for draft, label in zip(drafts, unique_names([joined(d.scope, d.label) for d in drafts]), strict=True):
        done[id(draft)] = _variable(draft, label)
    return lambda draft: done.get(id(draft)) or _variable(draft, draft.label)


def _variable(draft: _Draft, label: str) -> Variable:
    shape, dtype = getattr(draft.aval, "shape", None), getattr(draft.aval, "dtype", None)
    has_size = shape is not None and isinstance(dtype, np.dtype) and not _jax.is_reference(draft.aval)
    size = nbytes(draft.aval) if has_size else None
    return Variable(label, draft.kind, draft.scope, shape, dtype, size, draft.named, draft.aval, draft.value)
