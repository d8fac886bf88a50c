"""All contact with the semi-public parts of JAX, so that a new JAX version is the work of one room.

Everything here is plain plumbing around jaxprs and primitives; no other module of funcprop imports
`jax.extend`, `jax.interpreters` or reads the fields of an equation that JAX does not document.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.extend.core.primitives as jex_primitives
import jax.numpy as jnp
import numpy as np
from jax.core import eval_jaxpr as _eval_jaxpr
from jax.interpreters import ad, batching, mlir
from jax.interpreters import partial_eval as pe

from funcprop._jax.array_types import Aval as Aval
from funcprop._jax.array_types import align_varying_axes as align_varying_axes
from funcprop._jax.array_types import as_array as as_array
from funcprop._jax.array_types import explicitly_sharded as explicitly_sharded
from funcprop._jax.array_types import has_symbolic_size as has_symbolic_size
from funcprop._jax.array_types import inner_type as inner_type
from funcprop._jax.array_types import is_differentiable as is_differentiable
from funcprop._jax.array_types import is_reference as is_reference
from funcprop._jax.array_types import sharding_of as sharding_of
from funcprop._jax.array_types import varying_axes as varying_axes
from funcprop._jax.array_types import with_weak_type as with_weak_type
from funcprop._jax.array_types import with_zero_tangents as with_zero_tangents
from funcprop._jax.array_types import zero_tangent as zero_tangent
from funcprop._jax.compiled_programs import compiled_by_its_names as compiled_by_its_names
from funcprop._jax.compiled_programs import counted_flops as counted_flops
from funcprop._jax.compiled_programs import held_bytes as held_bytes
from funcprop._jax.compiled_programs import memory_fields as memory_fields
from funcprop._jax.compiled_programs import program_text as program_text
from funcprop._jax.compiled_programs import temporary_bytes as temporary_bytes
from funcprop._jax.platforms import default_platform as default_platform
from funcprop._jax.platforms import device_of as device_of
from funcprop._jax.platforms import is_staged_out as is_staged_out
from funcprop._jax.platforms import lowered_by_platform as lowered_by_platform
from funcprop._jax.platforms import platform_of as platform_of
from funcprop._jax.scopes import context as context
from funcprop._jax.scopes import context_of as context_of
from funcprop._jax.scopes import in_place_of as in_place_of
from funcprop._jax.scopes import placed as placed
from funcprop._jax.scopes import scope as scope
from funcprop._jax.scopes import scopes_of as scopes_of
from funcprop._jax.scopes import without_scope as without_scope
from funcprop._jax.source_lines import here as here
from funcprop._jax.source_lines import source_line as source_line
from funcprop._jax.surrounding import JIT as JIT
from funcprop._jax.surrounding import PassingTrace as PassingTrace
from funcprop._jax.surrounding import equation_of as equation_of
from funcprop._jax.surrounding import is_call_of as is_call_of
from funcprop._jax.surrounding import is_inlined as is_inlined
from funcprop._jax.surrounding import is_traced as is_traced
from funcprop._jax.surrounding import note_origin as note_origin
from funcprop._jax.surrounding import outside as outside
from funcprop._jax.surrounding import under as under

Equation = jex.JaxprEqn
InconclusiveDimensionOperation = jex.InconclusiveDimensionOperation
Literal = jex.Literal
Primitive = jex.Primitive
Var = jex.Var
Zero = ad.Zero
is_undefined_primal = ad.is_undefined_primal
instantiate_zeros = ad.instantiate_zeros
zeros_like_aval = ad.zeros_like_aval


# --- jaxprs -----------------------------------------------------------------------------------


def open_jaxpr(jaxpr: Any) -> Any:
    """The jaxpr itself, whether `jaxpr` carries its constants or not."""
    return jaxpr.jaxpr if isinstance(jaxpr, jex.ClosedJaxpr) else jaxpr


def constants(jaxpr: Any) -> list[Any]:
    """The constants that `jaxpr` carries; empty for one that carries none."""
    return list(getattr(jaxpr, "consts", ()) or ())


def array_constants(jaxpr: Any) -> list[Any]:
    """The constants as a traced function knows them.

    JAX keeps an array that is written in the function as NumPy's, which a custom derivative that saves it
    cannot index by a traced integer.
    """
    pairs = zip(constants(jaxpr), open_jaxpr(jaxpr).constvars, strict=True)
    return [
        with_weak_type(jnp.asarray(c, v.aval.dtype), v.aval.weak_type) if isinstance(c, np.ndarray) else c
        for c, v in pairs
    ]


def is_jaxpr(value: Any) -> bool:
    return isinstance(value, jex.ClosedJaxpr | jex.Jaxpr)


def evaluate(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """Evaluate a jaxpr; every equation runs under its own name stack, source line and context."""
    if isinstance(jaxpr, jex.ClosedJaxpr) and jex.ClosedJaxpr is jex.Jaxpr:
        jaxpr = jaxpr.replace(consts=list(consts))
    return _eval_jaxpr(jaxpr, list(consts), *args)


def jaxpr_of(equations: Sequence[Equation], invars: Sequence[Var], outvars: Sequence[Var], name: str) -> Any:
    """A jaxpr without constants made of `equations`."""
    debug = jex.DebugInfo(
        "funcprop",
        name,
        tuple(f"in{i}" for i in range(len(invars))),
        tuple(f"out{i}" for i in range(len(outvars))),
    )
    effects: Any = frozenset().union(*(e.effects for e in equations))
    effects = frozenset(effect for effect in effects if not _is_input_effect(effect))
    effects |= _input_effects(equations, invars)
    return jex.Jaxpr((), list(invars), list(outvars), list(equations), effects, debug)


def _is_input_effect(effect: Any) -> bool:
    return hasattr(effect, "input_index")


def closes_over_references(jaxpr: Any) -> bool:
    """Whether a jaxpr uses mutable references that are not its arguments."""
    return any(is_reference(var.aval) for var in open_jaxpr(jaxpr).constvars)


def _input_effects(equations: Sequence[Equation], invars: Sequence[Var]) -> frozenset[Any]:
    """Effects on references name their operand by its position, so they are numbered anew."""
    position = {var: i for i, var in enumerate(invars)}
    found = set()
    for eqn in equations:
        operands = list(eqn.invars)
        effects: list[Any] = list(eqn.effects)
        for effect in filter(_is_input_effect, effects):
            operand = operands[effect.input_index]
            if operand in position:
                found.add(effect.replace(input_index=position[operand]))
    return frozenset(found)


def one_equation_jaxpr(eqn: Equation) -> Any:
    """One equation as a jaxpr, with an input for every operand, literals too."""
    invars: list[Any] = [jex.Var(operand.aval) for operand in eqn.invars]
    return jaxpr_of([eqn.replace(invars=invars)], invars, eqn.outvars, eqn.primitive.name)


def one_equation(eqn: Equation) -> Callable[..., list[Any]]:
    """One equation as a function from its operands to the list of its results."""
    jaxpr = one_equation_jaxpr(eqn)
    return lambda *args: evaluate(jaxpr, (), args)


def variables(atoms: Sequence[Any]) -> list[Any]:
    """The atoms that are variables, not literals."""
    return [v for v in atoms if not isinstance(v, Literal)]


def free_variables(eqns: Sequence[Any]) -> list[Var]:
    """Find the variables that equations read and do not define, in order of first reading."""
    defined = {v for eqn in eqns for v in eqn.outvars}
    read = [v for eqn in eqns for v in eqn.invars if not isinstance(v, Literal)]
    return list(dict.fromkeys(v for v in read if v not in defined))


def needed_equations(eqns: Sequence[Any], results: Sequence[Any], given: Collection[Any] = ()) -> list[Any]:
    """Find the equations that some results depend on, in order; `given` variables need not be computed."""
    needed, kept = {v for v in variables(results) if v not in given}, []
    for eqn in reversed(eqns):
        if any(v in needed for v in eqn.outvars):
            kept.append(eqn)
            needed.update(v for v in variables(eqn.invars) if v not in given)
    return kept[::-1]


def without_unread_inputs(jaxpr: Any, keep: Sequence[bool]) -> tuple[Any, list[bool]]:
    """`jaxpr` without what no result needs, inside loops too, and which inputs remain: those read or kept."""
    pruned, remaining = pe.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=list(keep))
    return pruned, list(remaining)


def with_results(jaxpr: Any, outvars: Sequence[Any]) -> Any:
    """The jaxpr with other results."""
    debug = jaxpr.debug_info._replace(result_paths=None)
    return jaxpr.replace(outvars=list(outvars), debug_info=debug)


def inlined(closed: Any, keep: Callable[[Equation], bool] = lambda eqn: False) -> Any:
    """The jaxpr with the bodies of nested jits in place of their calls, but for those that `keep` names.

    The scopes around a call become those of its body. Nothing is traced, so it may be called where the axis
    names of an enclosing `shard_map` are unbound.
    """
    inner = open_jaxpr(closed)
    if not any(eqn.primitive.name == JIT for eqn in inner.eqns):
        return closed
    equations: list[Equation] = []
    constvars, consts = list(inner.constvars), constants(closed)

    def inline(jaxpr: Any, inputs: Sequence[Any], outer: Any = None) -> list[Any]:
        """Append the equations of a body whose constants and arguments are `inputs`; its results."""
        atoms = dict(zip([*jaxpr.constvars, *jaxpr.invars], inputs, strict=True))
        for eqn in jaxpr.eqns:
            operands = [v if isinstance(v, Literal) else atoms[v] for v in eqn.invars]
            stack = eqn.source_info.name_stack
            stack = stack if outer is None else outer + stack
            if eqn.primitive.name == JIT and not keep(eqn):
                body = eqn.params["jaxpr"]
                closed_over = [Var(v.aval) for v in open_jaxpr(body).constvars]
                constvars.extend(closed_over)
                consts.extend(constants(body))
                results = inline(open_jaxpr(body), [*closed_over, *operands], stack)
            else:
                results = [Var(v.aval) for v in eqn.outvars]
                where = eqn.source_info.replace(name_stack=stack)
                equations.append(eqn.replace(invars=operands, outvars=results, source_info=where))
            atoms.update(zip(eqn.outvars, results, strict=True))
        return [v if isinstance(v, Literal) else atoms[v] for v in jaxpr.outvars]

    outvars = inline(inner, [*inner.constvars, *inner.invars])
    replaced: dict[str, Any] = {"constvars": constvars, "eqns": equations, "outvars": outvars}
    if jex.ClosedJaxpr is jex.Jaxpr:
        return inner.replace(**replaced, consts=consts)
    return jex.ClosedJaxpr(inner.replace(**replaced), consts)


def with_constants_as_inputs(jaxpr: Any) -> tuple[Any, list[Any]]:
    """An equivalent jaxpr that takes its constants as leading inputs, and these constants."""
    inner, consts = open_jaxpr(jaxpr), constants(jaxpr)
    if not consts:
        return inner, []
    names = inner.debug_info.arg_names
    debug = inner.debug_info._replace(arg_names=None if names is None else ("",) * len(consts) + tuple(names))
    replaced: dict[str, Any] = {"constvars": [], "debug_info": debug}
    if jex.ClosedJaxpr is jex.Jaxpr:
        replaced["consts"] = []
    return inner.replace(invars=[*inner.constvars, *inner.invars], **replaced), consts


def closed_like(like: Any, jaxpr: Any) -> Any:
    """An open jaxpr without constants in the form of another one, which may be of those that carry some."""
    return jex.ClosedJaxpr(jaxpr, []) if like is not open_jaxpr(like) else jaxpr


def retrace(fun: Callable[..., Any], like: Any) -> Any:
    """Trace `fun` at the input types of the jaxpr `like`; a jaxpr that carries its constants."""
    return jax.make_jaxpr(fun)(*[v.aval for v in open_jaxpr(like).invars])


def sub_jaxprs(eqn: Equation) -> Iterator[tuple[str, Any]]:
    """The jaxprs in an equation's parameters, each with the parameter's name (`branches[1]`)."""
    for key, value in eqn.params.items():
        if is_jaxpr(value):
            yield key, value
        elif isinstance(value, tuple | list):
            for i, item in enumerate(value):
                if is_jaxpr(item):
                    yield f"{key}[{i}]", item


def equations(jaxpr: Any, into: Callable[[Equation], bool] = lambda eqn: True) -> Iterator[Any]:
    """The equations of a jaxpr and of the bodies of those that are looked `into`, each before its bodies."""
    for eqn in open_jaxpr(jaxpr).eqns:
        yield eqn
        if into(eqn):
            for _, body in sub_jaxprs(eqn):
                yield from equations(body, into)


def calls_back(jaxpr: Any) -> bool:
    """Whether running a jaxpr has side effects outside of JAX that are not for debugging."""
    return any(eqn.primitive.name == "io_callback" for eqn in equations(jaxpr))


def map_jaxprs(params: Mapping[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """The parameters of an equation with `change(jaxpr)` in place of each jaxpr among them."""
    changed = dict(params)
    for key, value in params.items():
        if is_jaxpr(value):
            changed[key] = change(value)
        elif isinstance(value, tuple | list) and any(map(is_jaxpr, value)):
            items = [change(item) if is_jaxpr(item) else item for item in value]
            changed[key] = type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return changed


def scan_counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """How many constants and carries a scan has, by its parameters; the remaining operands are scanned."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


# --- names -----------------------------------------------------------------------------------


def jaxpr_name(jaxpr: Any) -> str:
    """The name of the function that was traced."""
    return open_jaxpr(jaxpr).debug_info.func_name


def function_name(eqn: Equation) -> str:
    """Name an equation: by its function, if that has a derivative of its own, else by the primitive."""
    body = eqn.params.get("call_jaxpr")
    if not eqn.primitive.name.startswith("custom_") or body is None:
        return eqn.primitive.name
    name = jaxpr_name(body)
    return name if name.isidentifier() else eqn.primitive.name


# --- primitives -------------------------------------------------------------------------------


def known_primitives() -> frozenset[str]:
    """The names of the primitives that this JAX can differentiate."""
    named = {p.name for table in (ad.primitive_jvps, ad.primitive_transposes) for p in table}
    return frozenset(named | {p.name for p in vars(jex_primitives).values() if isinstance(p, Primitive)})


def define_primitive(
    name: str,
    *,
    call: Callable[..., Sequence[Any]],
    abstract: Callable[..., Sequence[Aval]],
    jvp: Callable[..., Any],
    transpose: Callable[..., Any],
    batch: Callable[..., Any],
    lowering: Any = None,
) -> Primitive:
    """A primitive with several results whose meaning is the traceable function `call`.

    `lowering` is a lowering rule (`lowered_by_platform`), if it is to be lowered otherwise.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_impl(call)
    primitive.def_abstract_eval(abstract)
    lower = lowering or mlir.lower_fun(call, multiple_results=True)
    # Where it stands, not in a function of its own, by which JAX would look for an equal one.
    mlir.register_lowering(primitive, lower, cacheable=False)
    ad.primitive_jvps[primitive] = jvp
    ad.primitive_transposes[primitive] = transpose
    batching.fancy_primitive_batchers[primitive] = batch
    return primitive
