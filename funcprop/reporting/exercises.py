"""The chapter's five exercises, answered for any function: each prediction beside its measurement.

1. A gradient has the shape of what it is taken by. Its length is the slope of the objective in its
   direction, `‖∇J‖ = d/dt J(θ + t ∇J / ‖∇J‖)`, which is measured by a central difference.
2. A bias `b` is added to `z`, the first product with a parameter: `∂J/∂b` is `∂J/∂z`, added over all axes
   that the bias does not have; again its length is a slope.
3. Bytes of inference and training, estimated and compiled.
4. Matrix products and times of second derivatives, predicted and counted.
5. Bytes of one device under every plan, predicted and, where a plan was compiled, proved.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from funcprop.cost.second_order import Cost, SecondOrderCost
from funcprop.cost.split import function_of
from funcprop.equations.condense import condense
from funcprop.equations.plain_graph import plain
from funcprop.graph.graph import Operator, Variable, bytes_text, shape_text
from funcprop.graph.objective import Objective
from funcprop.memory.ledger import Footprint
from funcprop.partition.partition_plan import PartitionPlan
from funcprop.partition.plans import RejectedPlan
from funcprop.partition.proof import PartitionProof
from funcprop.partition.search import plan
from funcprop.program.batch_arguments import of_batch
from funcprop.program.facts import PRODUCTS, is_view
from funcprop.reporting.layers import Memory
from funcprop.reporting.number_text import amount, count, digits
from funcprop.sweeps.propagation import Propagation
from funcprop.training.loop import Setup, first_minibatch

# So many gradients have a row, and so many plans that cannot be made are explained.
_SHOWN = 6
# The page plans for so many devices.
_DEVICES = 4
# Of so few bytes, what lies between the arrays is a part that is seen.
_SMALL = 16_384
LEFT_TO_THE_COMMAND = "Plans for a function of this size are left to funcprop partition."
# A function with more operators is written operator by operator alone, and what rules gain, slopes and plans
# are left out.
MOST_LINES = 1000
# What a bias of a layer is called; elsewhere it is what is added to a product.
_BIASES = frozenset({"b", "bias", "offset", "beta"})


@dataclass(frozen=True)
class Compared:
    """A quantity, predicted and measured; a dash where it is not."""

    what: str
    predicted: str
    measured: str = "–"


@dataclass(frozen=True)
class Exercise:
    """A question of the chapter, the answer for a function, and the numbers."""

    number: int
    question: str
    answer: str
    rows: tuple[Compared, ...]


def all_exercises(
    objective: Objective,
    propagation: Propagation | None,
    cost: SecondOrderCost,
    memory: Memory,
    plans: Sequence[PartitionPlan],
    why: str,
) -> tuple[Exercise, ...]:
    """The answers for a function, from what else is known of it; nothing new is compiled for plans."""
    nbytes = sum(v.nbytes or 0 for v in objective.inputs.values())
    *_, ledger = memory.footprint.ledgers.values()
    return (
        gradient_shapes(objective, propagation),
        bias(objective, propagation),
        memory_held({"": memory.footprint}, memory.data),
        second_derivatives(cost),
        several_devices([(made, None) for made in plans], why, nbytes, ledger.held),
    )


def gradient_shapes(objective: Objective, propagation: Propagation | None) -> Exercise:
    """Exercise 1."""
    inputs = list(objective.inputs.values())
    found = None if propagation is None else propagation.gradients
    rows = [
        Compared(
            f"gradient of {v.name}",
            shape_text(v.shape),
            "–" if found is None else shape_text(found[v.name].shape),
        )
        for v in inputs[:_SHOWN]
    ]
    parameters = sum(v.aval.size for v in inputs)
    if found is not None:
        program = jax.jit(function_of(objective))
        given, others = _arguments(objective)
        length, slope = _slope(lambda of: program(of, others), given, [found[v.name] for v in inputs])
        rows.append(Compared("length of the gradient, and slope along it", digits(length), digits(slope)))
    rows.append(Compared("entries of the Hessian", amount(parameters**2, "entries")))
    further = f" There are {len(inputs) - _SHOWN} more gradients." if len(inputs) > _SHOWN else ""
    answer = f"That of the argument it belongs to; the Hessian has {count(parameters)}² entries.{further}"
    return Exercise(1, "What shape has a gradient?", answer, tuple(rows))


def bias(objective: Objective, propagation: Propagation | None) -> Exercise:
    """Exercise 2."""
    names = _biases(objective)
    listed = ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
    has = f"It has biases: {listed}. " if names else "It has no bias. "
    question, found = "What does a bias change?", _first_product(objective)
    if found is None:
        return Exercise(2, question, f"{has}It has no product with a parameter to which one is added.", ())
    z, axes = found
    others = tuple(i for i in range(len(z.shape or ())) if i not in axes)
    over = f", added over {'axes' if len(others) > 1 else 'axis'} {', '.join(map(str, others))}"
    answer = (
        f"{has}One more, b, is added to the first product with a parameter ({z.name}): one square more leads "
        f"into the sum, and ∂J/∂b is the gradient of that product{over if others else ''}. It needs no value "
        "of the forward sweep, and weight decay leaves it alone."
    )
    shape = shape_text([n for i, n in enumerate(z.shape or ()) if i in axes])
    rows = [Compared("shape of ∂J/∂b", shape)]
    if propagation is not None:
        given, rest = _arguments(objective)
        tail = jax.jit(function_of(objective, [z]))
        gradient = propagation.gradients[z.name].sum(others)
        length, slope = _slope(
            lambda b: tail(given, rest, [propagation.values[z.name] + jnp.expand_dims(b[0], others)]),
            [jnp.zeros_like(gradient)],
            [gradient],
        )
        rows = [Compared("shape of ∂J/∂b", shape, shape_text(gradient.shape))]
        rows.append(Compared("length of ∂J/∂b, and slope along it", digits(length), digits(slope)))
    return Exercise(2, question, answer, tuple(rows))


def memory_held(footprints: Mapping[str, Footprint], data: str) -> Exercise:
    """Exercise 3, of several footprints by what each is of."""
    rows = tuple(
        Compared(
            f"{label}{name}",
            bytes_text(ledger.estimate),
            "–" if ledger.compiled is None else bytes_text(ledger.held),
        )
        for label, found in footprints.items()
        for name, ledger in found.ledgers.items()
    )
    answer = f"Training keeps what the backward sweep will read. The data: {data}."
    return Exercise(3, "What does memory hold?", answer, rows)


def second_derivatives(cost: SecondOrderCost) -> Exercise:
    """Exercise 4."""
    rows = tuple(Compared(row.name, _work(row.predicted), _work(row.measured)) for row in cost.rows)
    answer = (
        "The graph of the gradient is differentiated once more: a product with the Hessian costs a few "
        "gradients, the whole Hessian one product for each parameter."
    )
    if any(row.measured is not None and row.measured.products < row.predicted.products for row in cost.rows):
        answer += " XLA has fewer where a matrix has one row or column: it multiplies entry by entry."
    return Exercise(4, "What do second derivatives cost?", answer, rows)


def _work(cost: Cost | None) -> str:
    """Matrix products, and milliseconds if it was timed."""
    if cost is None:
        return "–"
    products = f"{amount(cost.products, 'products')} product{'' if cost.products == 1 else 's'}"
    return products if cost.seconds is None else f"{products}, {digits(1000 * cost.seconds)} ms"


def several_devices(
    plans: Sequence[tuple[PartitionPlan, PartitionProof | None]], why: str, parameter_bytes: int, held: int
) -> Exercise:
    """Exercise 5: plans with their proofs; `why` there is none, if there is none."""
    rows = []
    for made, proof in plans:
        rows.append(
            Compared(
                f"{made.name}, bytes of a device",
                bytes_text(made.predicted.total),
                "–" if proof is None else bytes_text(proof.compiled),
            )
        )
        if made.communicated:
            sent = "–" if proof is None else bytes_text(proof.as_dict()["communicated"])
            rows.append(Compared(f"{made.name}, bytes sent", bytes_text(made.communicated), sent))
    answer = (
        f"Parameters are {bytes_text(parameter_bytes)}, whatever the batch; a smaller batch shrinks only the "
        f"rest of the {bytes_text(held)}, and half of it makes the noise of a gradient 1.41 times as large. "
        "In a pipeline of S stages and M microbatches, (S − 1) / (M + S − 1) of the time is idle. "
        f"{why}"
    )
    if any(proof is not None and made.predicted.total < _SMALL for made, proof in plans):
        answer += " So small arrays take more than their entries: XLA begins each at a multiple of 64 bytes."
    return Exercise(5, "What if it is too large for one device?", answer.strip(), tuple(rows))


def planned(
    fun: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], argnums: Any, setup: Setup | None
) -> tuple[list[PartitionPlan], str]:
    """Plans for four devices of a loss, or of the training run, and why some cannot be made."""
    if setup is not None:
        loss, params, rest = of_batch(setup.loss), setup.params, first_minibatch(setup)
    elif argnums in (0, (0,)) and len(args) + len(kwargs) > 1:
        loss, params = of_batch(fun, tuple(kwargs)), args[0]
        rest = (*args[1:], *kwargs.values())
    else:
        return [], "Plans need a loss of parameters and data, loss(params, *data)."
    optimizer = None if setup is None else setup.optimizer
    found: list[PartitionPlan] = []
    refused: list[RejectedPlan] = []
    for mesh in ({"data": _DEVICES}, {"model": _DEVICES}):
        try:
            one = plan(loss, optimizer=optimizer, mesh=mesh)(params, rest, on=f"h100:{_DEVICES}")
            found += [made for made in one if made.predicted.total]
        except (TypeError, ValueError) as error:
            refused.append(RejectedPlan(f"{' × '.join(mesh)} {_DEVICES}", str(error)))
    said = f"Plans are for {_DEVICES} devices; funcprop partition has pipelines and ZeRO-3 as well."
    return found, f"{said} {refusals(refused)}"


def refusals(plans: Sequence[RejectedPlan]) -> str:
    """Which kinds of plans cannot be made: those that fail for one reason together, in a sentence."""
    kinds: dict[str, list[str]] = {}
    for rejected in plans:
        reason = re.sub(r"^\w+=\d+: ", "", rejected.why.splitlines()[0].partition(";")[0].rstrip("."))
        kinds.setdefault(reason, []).append(rejected.name)
    return " ".join(
        f"There is no plan {' and no plan '.join(names)}: {reason}." for reason, names in kinds.items()
    )


# --- slopes -----------------------------------------------------------------------------------


def _arguments(objective: Objective) -> tuple[list[Any], list[Any]]:
    """What is differentiated by, and the other arrays."""
    traced = objective.traced
    chosen = [traced.leaves[i] for i in objective.inputs]
    return chosen, [traced.leaves[i] for i in traced.arguments if i not in objective.inputs]


def _slope(
    function: Callable[[list[Any]], Any], at: Sequence[Any], gradient: Sequence[Any]
) -> tuple[float, float]:
    """The length of a gradient, and the slope in its direction by a central difference."""
    length = optax.tree.norm(list(gradient))
    step = max(float(jnp.finfo(jnp.result_type(g)).eps) for g in gradient) ** (1 / 3)

    def moved(by: float) -> Any:
        scale = by / jnp.where(length == 0, 1, length)
        return function([x + (scale * g.conj()).astype(g.dtype) for x, g in zip(at, gradient, strict=True)])

    return float(length), float((moved(step) - moved(-step)) / (2 * step))


def _first_product(objective: Objective) -> tuple[Variable, tuple[int, ...]] | None:
    """The first product of a value with a parameter, and its axes that come from the parameter."""
    parameters = {v.name for v in objective.inputs.values()}
    for op in objective.traced.graph:
        weights = [i for i, v in enumerate(op.inputs) if v.kind != "literal" and v.name in parameters]
        if not weights or len(op.outputs) != 1:
            continue
        if op.equation is not None and op.call is None and is_view(op.equation):
            parameters.add(op.outputs[0].name)
        elif len(weights) == 1 and (op.op in PRODUCTS or op.call is not None):
            return op.outputs[0], tuple(_axes_of_weight(op, weights[0]))
    return None


def _biases(objective: Objective) -> list[str]:
    """The arguments that are added to a product, in whatever shape, or called so."""
    inputs, graph = list(objective.inputs.values()), objective.traced.graph
    added: set[str] = set()
    if len(graph) <= MOST_LINES:
        roles = condense(plain(graph), objective.result, [v.name for v in inputs]).roles
        added = {name for name, (role, _) in roles.items() if role == "bias"}
    return [v.name for v in inputs if v.name in added or v.name.rpartition("/")[2] in _BIASES]


def _axes_of_weight(op: Operator, weight: int) -> Iterator[int]:
    axes = list(range(len(op.outputs[0].shape or ())))
    if op.call is not None:
        # Examples are mapped; of one of them, units are the last axis.
        for mapped in reversed(op.call.axes):
            axis = mapped.out_axes[0]
            if axis is not None:
                del axes[axis]
        yield from axes[-1:]
    elif op.op == "dot_general":
        (contracted, _), (together, _) = op.static["dimension_numbers"]
        left = len(op.inputs[0].shape or ()) - len(contracted)
        yield from axes[len(together) : left] if weight == 0 else axes[left:]
    else:
        yield op.static["dimension_numbers"].out_spec[1]
