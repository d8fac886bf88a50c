"""A trace that changes nothing: whatever is bound under it is bound in the trace around it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.extend.core as jex
from jax.core import Trace, Tracer
from jax.extend import source_info_util

# The name of the primitive of `jax.jit`.
JIT = "jit"


class PassingTrace(Trace):
    """Hands every primitive on to `parent_trace`; a subclass looks at what passes.

    It makes no tracers. What the function computes are the values of the trace around it, so that whatever
    python can ask of them is answered as if this trace were not there.
    """

    def __init__(self, parent_trace: Trace) -> None:
        super().__init__()
        self.parent_trace: Any = parent_trace
        self.requires_low = False
        # Caches, and objects that may be changed only under the trace that made them, compare traces by this.
        self._weakref = self.parent_trace._weakref

    def __getattr__(self, name: str) -> Any:
        # What else JAX asks of the current trace (the state of a mutable object) the one around it knows.
        if name == "parent_trace":
            raise AttributeError(name)  # Not there yet: the trace is being made.
        return getattr(self.parent_trace, name)

    def bind(self, primitive: Any, operands: Sequence[Any], params: Mapping[str, Any]) -> Any:
        """Bind a primitive in the trace around this one."""
        avals = tuple(map(jax.typeof, operands))
        return primitive.bind_with_trace(self.parent_trace, operands, avals, dict(params))

    def ended(self) -> None:
        """Forget values: JAX keeps the trace, as the one around a body that it has cached."""

    def stage_value(self, value: Any) -> Any:
        return self.parent_trace.stage_value(value)

    def process_primitive(self, primitive: Any, operands: Any, params: Any, /) -> Any:
        return self.bind(primitive, operands, params)

    def process_custom_jvp_call(
        self, primitive: Any, fun: Any, jvp: Any, operands: Any, /, **options: Any
    ) -> Any:
        return self.parent_trace.process_custom_jvp_call(primitive, fun, jvp, operands, **options)

    def process_custom_vjp_call(
        self, primitive: Any, fun: Any, fwd: Any, bwd: Any, operands: Any, /, **options: Any
    ) -> Any:
        return self.parent_trace.process_custom_vjp_call(primitive, fun, fwd, bwd, operands, **options)

    def process_call(self, primitive: Any, fun: Any, operands: Any, params: Any, /) -> Any:
        return self.parent_trace.process_call(primitive, fun, operands, params)

    def process_shard_map(self, primitive: Any, fun: Any, operands: Any, /, **params: Any) -> Any:
        return self.parent_trace.process_shard_map(primitive, fun, operands, **params)


@contextlib.contextmanager
def under(trace_in: Callable[[Trace], PassingTrace]) -> Iterator[None]:
    """Run a block under `trace_in(the current trace)`."""
    with jex.take_current_trace() as parent:
        trace = trace_in(parent)
        try:
            with jex.set_current_trace(trace):
                yield
        finally:
            trace.ended()


def outside(trace: PassingTrace) -> contextlib.AbstractContextManager[Any]:
    """Run a block under the trace around `trace`."""
    return jex.set_current_trace(trace.parent_trace)


def note_origin(values: Sequence[Any]) -> None:
    """Let tracers say where they were made, should one be used after its transformation has ended."""
    unknown = [x for x in values if isinstance(x, Tracer) and getattr(x, "_line_info", None) is None]
    if unknown:
        source = source_info_util.current()
        for x in unknown:
            x._line_info = source


def is_traced(value: Any) -> bool:
    """Whether a value is a tracer: something that a transformation around the function looks at."""
    return isinstance(value, Tracer)


def is_inlined(primitive: Any, params: Mapping[str, Any]) -> bool:
    """Whether a primitive is a jit in whose place its body stands wherever it is traced."""
    if primitive.name != JIT:
        return False
    inline = params.get("inline")
    return inline is True or getattr(inline, "name", None) == "JAX_EARLY"  # An enumeration since JAX 0.11.


def is_call_of(function: Any, fun: Any, jvp: Any) -> bool:
    """Whether what a trace is given of a call, `fun` and `jvp`, are those of a `jax.custom_jvp` function."""
    return getattr(fun, "f", None) is function.fun and getattr(jvp, "f", None) is function.jvp


def equation_of(primitive: Any, invars: Sequence[Any], params: Mapping[str, Any]) -> Any:
    """The equation of a primitive on variables and literals."""
    results, effects = primitive.abstract_eval(*(v.aval for v in invars), **params)
    avals = results if primitive.multiple_results else [results]
    return jex.new_jaxpr_eqn(list(invars), [jex.Var(a) for a in avals], primitive, dict(params), effects)
