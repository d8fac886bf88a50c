"""Rematerialisation under a budget: what to save for the backward sweep, and what to compute again.

A program is a chain of steps with cut points between them. Of `N` equal layers cut into `k` recomputed
chunks, `k + N/k` units are held at the peak: `k` inputs of chunks, and the `N/k` layers of the one chunk that
is being differentiated; with `k = √N` that is `2√N` (Chen et al. 2016). Here layers and chunks need not be
equal, what is cheap to hold for its FLOPs is held inside of them, and a schedule is chosen among all by
dynamic programming (`funcprop.memory.remat.schedule`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from funcprop import _jax
from funcprop._jax import nnx
from funcprop.memory.remat.chain import flat
from funcprop.memory.remat.limits import Budget, RematLimits
from funcprop.memory.remat.plan import RematPlan
from funcprop.memory.remat.solution import RematSolver
from funcprop.program.call import Call, is_array, name_of, traced


def rematerialize(
    fun: Callable[..., Any],
    budget: Budget = None,
    *,
    peak: Budget = None,
    chunks: int | None = None,
    count_arguments: bool = False,
    argnums: int | Sequence[int] = 0,
    measure: bool = True,
    target: Any = None,
) -> Callable[..., Any]:
    """Bound the bytes that a function's reverse mode holds between its sweeps by `budget`.

    With `S` the values held and `R` the operators run again, it solves

        minimise Σ_{o ∈ R} flops(o)   subject to   Σ_{v ∈ S} bytes(v) ≤ budget,

    where `R` makes everything that the backward sweep reads from `S`, in segments between cut points. What is
    held is not all: a program's peak has cotangents, scratch, and what a segment needs while it is run again.
    So schedules of lower peaks and equal chunks are compared with this one by the temporary bytes of their
    compiled gradients. Of those that reach the budget's share of the plain program's bytes the one of fewest
    FLOPs is taken. If none does, it is the one of fewest bytes, even if it holds more than the budget between
    the sweeps, and the plan's `reason` says so. If none holds less than the plain program, or the budget is
    met anyway, the function is left as it is.

    Gradients are the same numbers. The result is an ordinary function, made of `jax.checkpoint`s, of bodies
    of `scan` that hold less, and of scans in chunks; it composes with `jit`, `grad`, `jvp`, `vmap`, `fp.grad`
    and frameworks' own transformations.

    The bytes are those of the leaves of `jax.vjp(f, *x)[1]` that are neither arguments nor constants of the
    function, differentiated in all its traced arguments: parameters and data exist anyway. It is planned
    whenever it is traced, so put it under `jax.jit`; and inside `vmap` the budget is that of one example. The
    outermost `jit` needs the plan's `compiler_options` on some backends, see `remat_plan`.

    Rules hold less than autodiff. `fp.grad(rematerialize(f, …))` has them besides the plan; for a budget
    that takes them into account, plan the function with its rules, `rematerialize(fp.with_rules(f), …)`.

    Args:
        fun: any JAX function, also a method.
        budget: bytes if it is an int or text ("8GB"); if it is a float or "25%", a share of what the function
            holds as it stands.
        peak: a second limit in the same units, on the predicted peak: what is held, and what one segment
            needs while it is recomputed and differentiated. Without, it only decides between equal FLOPs.
        chunks: instead of a budget, recompute everything in so many pieces of about equal size.
        count_arguments: count arguments and constants that are held as well, and in shares.
        argnums: the arguments of the gradient that is compiled, as in `fp.grad`.
        measure: whether programs are compiled, about six, while the function is traced. If not, the schedule
            is the one of fewest FLOPs by what is held. So it is where nothing can be compiled by itself (in
            the body of a `shard_map`, or with references), and below 64 KiB held.
        target: what the gradient is compiled for: a platform's name, a device, a topology (that is only
            described, too) or an `fp.Machine`; by default the devices of the arguments, or JAX's own. For a
            platform of which there is no device, nothing is compiled.

    Raises:
        BudgetError: nothing fits; says how many bytes would.
        TypeError, ValueError: a budget that is none.
        RuleError: `target` is no machine.

    Reference: Chen, Xu, Zhang, Guestrin, "Training deep nets with sublinear memory cost", 2016; Griewank,
    Walther, "Algorithm 799: revolve", 2000; Beaumont et al., "Optimal checkpointing for heterogeneous
    chains", 2019; Jain et al., "Checkmate", 2020, for the integer program that the tests compare with.

    Example:
        >>> import jax, jax.numpy as jnp, funcprop as fp
        >>> def loss(ws, x):
        ...     for w in ws:
        ...         x = jnp.tanh(x @ w)
        ...     return jnp.sum(x)
        >>> ws, x = [jnp.eye(3)] * 4, jnp.ones((2, 3))
        >>> lean = fp.memory.rematerialize(loss, 0.5)
        >>> print(jax.jit(jax.grad(lean))(ws, x)[0][0] == jax.grad(loss)(ws, x)[0][0])
        [ True  True  True]
    """
    limits = RematLimits(budget, peak, chunks, count_arguments, argnums, measure, target)
    return Rematerializer(limits).applied(fun)


def remat_plan(
    fun: Callable[..., Any],
    budget: Budget = None,
    *,
    peak: Budget = None,
    chunks: int | None = None,
    count_arguments: bool = False,
    argnums: int | Sequence[int] = 0,
    measure: bool = True,
    target: Any = None,
) -> Callable[..., RematPlan]:
    """Plan what `rematerialize` does: `remat_plan(fun, budget)(*args, **kwargs) -> RematPlan`.

    Nothing is computed; arrays may be `jax.ShapeDtypeStruct`s. `print(plan)` is a report, `plan.prove()`
    compiles the gradient both ways, `plan.compiler_options` belong to the outermost `jit`, and `plan.policy`
    is a coarser way to the same budget for `jax.checkpoint`.

    Args and errors as in `fp.memory.rematerialize`.

    Example:
        >>> import jax, jax.numpy as jnp, funcprop as fp
        >>> def loss(ws, x):
        ...     for w in ws:
        ...         x = jnp.tanh(x @ w)
        ...     return jnp.sum(x)
        >>> square, x = jax.ShapeDtypeStruct((3, 3), "float32"), jax.ShapeDtypeStruct((2, 3), "float32")
        >>> plan = fp.memory.remat_plan(loss, budget=100)([square] * 4, x)
        >>> plan.residual_bytes, plan.forward_flops, 0 < plan.extra_flops < 0.2 * plan.forward_flops
        (96, 174, True)
    """
    limits = RematLimits(budget, peak, chunks, count_arguments, argnums, measure, target)
    return Rematerializer(limits).plan_of(fun)


class Rematerializer(RematSolver):
    """Functions that follow the plan of the limits asked for; equal programs are planned once."""

    def applied(self, fun: Callable[..., Any]) -> Callable[..., Any]:
        """Bound what a function holds, as `rematerialize`."""

        def run(fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = Call.of(args, kwargs, _jax.is_traced)
            structure: list[Any] = []

            def arrays(*values: Any) -> list[Any]:
                leaves = call.filled(values)
                given = call.arguments(leaves)
                result = fun(*given[0], **given[1])
                _require_unchanged(given, leaves, call.tree)
                results, tree = jax.tree.flatten(result)
                kept = [None if _jax.is_traced(x) else (x,) for x in results]
                structure.append((tree, kept))
                return [x for x, k in zip(results, kept, strict=True) if k is None]

            closed = traced(arrays, call.values, fun, "a differentiated argument")
            found = self.solve(flat(closed), name_of(fun), call, args)
            outputs = found.program.run(found.schedule, call.values)
            outvars = _jax.open_jaxpr(closed).outvars
            computed = iter([_jax.as_array(x, v.aval) for x, v in zip(outputs, outvars, strict=True)])
            tree, kept = structure[-1]
            return jax.tree.unflatten(tree, [next(computed) if k is None else k[0] for k in kept])

        @functools.wraps(fun)
        def lean(*args: Any, **kwargs: Any) -> Any:
            if nnx.has_models((args, kwargs)):
                return nnx.call(run, fun, args, kwargs)
            return run(fun, args, kwargs)

        return lean

    def plan_of(self, fun: Callable[..., Any]) -> Callable[..., RematPlan]:
        """Plan that, as `remat_plan`."""

        def planned(*args: Any, **kwargs: Any) -> RematPlan:
            def plan(fun: Callable[..., Any], args: Any, kwargs: Any) -> RematPlan:
                call = Call.of(args, kwargs, is_array)

                def arrays(*values: Any) -> list[Any]:
                    call_args, call_kwargs = call.arguments(call.filled(values))
                    results = jax.tree.leaves(fun(*call_args, **call_kwargs))
                    return [x for x in results if isinstance(x, jax.core.Tracer)]

                closed = flat(traced(arrays, call.values, fun))
                return self.solve(closed, name_of(fun), call, args)

            if nnx.has_models((args, kwargs)):
                return nnx.call(lambda *call: (plan(*call), None), fun, args, kwargs)
            return plan(fun, args, kwargs)

        return planned


def _require_unchanged(arguments: Any, leaves: Sequence[Any], tree: Any) -> None:
    """Raise a TypeError if the function has changed its arguments, which are copies of the caller's."""
    try:
        new_leaves, new_tree = jax.tree.flatten(arguments)
    except ValueError:
        return  # An object that is used up, like Equinox's `State`, holds nothing that could be lost.
    if new_tree != tree or any(new is not old for new, old in zip(new_leaves, leaves, strict=True)):
        raise TypeError(
            "rematerialize: the function changes a container among its arguments in place; it is traced with "
            "copies, so the change would be lost. Return the new value, or change the container outside."
        )
