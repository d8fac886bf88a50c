"""A model is for ONE example. What gives away that it is not: examples that mix.

Three signs are looked for, each refused with its reason. A collective over a named axis of the batch
(`jax.lax.pmean`, Equinox's and nnx's batch norm with an axis name) has no axis here. Statistics over a batch
of one (batch norm in training mode of a model that is called with `x[None]`) subtract from a value its own
mean over a leading axis of length one; those of a vector without a batch (Flax takes it), its mean over no
axis. Results beside the output (updated running averages) are read by no loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from funcprop import _jax
from funcprop.program.call import shown_types, succeeds
from funcprop.program.layer_calls import layer_call
from funcprop.program.program import Program

REMEDY = (
    "The gradient of one example is then no function of that example alone. Use the running averages "
    "(evaluation mode), or a normalisation within each example (group or layer norm)."
)


def example_of(x: Any) -> Any:
    """The type of one example of a batch, which may be one of shapes."""
    typed = jax.eval_shape(lambda x: x, x)
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), typed)


def types_of(tree: Any) -> Any:
    """The types of the arrays and numbers of a pytree."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a)), tree)


def trace_example(model: Callable[[Any, Any], Any], params: Any, x: Any) -> Program:
    """The program of a model of one example, from the types of its parameters and of the example.

    Raises:
        ValueError: the examples mix.
        TypeError: the output is no pytree of floating-point arrays.
    """
    try:
        program = Program.of(model, params, x, which="a parameter or an input")
    except NameError as error:
        if "axis name" not in str(error):
            raise
        raise ValueError(
            f"per_example: the examples mix: the model reduces over a named axis ({error}). {REMEDY}"
        ) from error
    except (TypeError, ValueError) as error:
        two = jax.tree.map(lambda a: jax.ShapeDtypeStruct((2, *jnp.shape(a)), jnp.result_type(a)), x)
        if not succeeds(model, params, two):
            raise
        given = ", ".join(str(jax.typeof(a)) for a in jax.tree.leaves(x))
        raise ValueError(
            f"per_example: the model {getattr(model, '__name__', model)!s} takes a batch and fails for ONE "
            f"example, x: {given} ({error}). Pass the model of one example, and its loss: per_example itself "
            "maps them over the leading axis of x and y."
        ) from error
    for path, leaf in jax.tree.leaves_with_path(program.results):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"per_example: the model's output{jax.tree_util.keystr(path)} is "
                f"{leaf.dtype}{list(leaf.shape)}; a model returns floating-point arrays, which "
                "`loss(output, y)` reads."
            )
    statistics_of_one(program.jaxpr)
    return program


def trace_loss(loss: Callable[[Any, Any], Any], output: Any, y: Any) -> Program:
    """The program of a loss of one example, from the types of the model's output and of the label.

    Raises:
        ValueError: it does not read all of the output; with the paths of what is not read.
        TypeError: it returns no scalar.
    """
    program = Program.of(loss, output, y, which="an output or a label")
    count = len(jax.tree.leaves(output))
    result = program.results
    if not (hasattr(result, "shape") and result.shape == () and jnp.issubdtype(result.dtype, jnp.floating)):
        raise TypeError(
            f"per_example: loss(output, y) of one example returned {shown_types(result)}; it must return a "
            "floating-point scalar. `model` and `loss` are for ONE example: per_example itself maps them "
            "over the leading axis of x and y."
        )
    before, inputs = len(program.constants), len(program.jaxpr.invars)
    read = _jax.without_unread_inputs(program.jaxpr, [False] * inputs)[1][before:]
    unread = [
        jax.tree_util.keystr(path)
        for (path, _), used in zip(jax.tree.leaves_with_path(output), read[:count], strict=True)
        if not used
    ]
    if unread and len(unread) < count:
        raise ValueError(
            f"per_example: the model returns output{', output'.join(unread)}, which loss(output, y) does not "
            "read. If these are updated statistics of the batch, the examples mix. "
            f"{REMEDY} If not, let the model return only what the loss reads."
        )
    return program


def statistics_of_one(body: Any, of: str = "per_example") -> None:
    """Refuse statistics of one example alone, and `fp.layers.batch_norm` in training mode.

    Raises:
        ValueError: the program, of a model or a loss of one example, has some; it begins with what they are
            asked `of`.
    """
    jaxpr = _jax.open_jaxpr(body)
    # The mean is followed through operators of one operand; beside it, what it is a mean of, and over what.
    means: dict[Any, tuple[Any, str]] = {}
    # In half precision the mean is of one conversion of the value and is subtracted from another.
    unconverted: dict[Any, Any] = {}
    for eqn in jaxpr.eqns:
        if (call := layer_call(eqn)) is not None and call.layer.name == "batch_norm" and _in_training(call):
            _refuse(of, eqn, "`fp.layers.batch_norm` computes its statistics")
        if call is None:
            for _, body in _jax.sub_jaxprs(eqn):
                statistics_of_one(body, of)
        operands = _jax.variables(eqn.invars)
        name = eqn.primitive.name
        values = [unconverted.get(v, v) for v in operands]
        if name == "convert_element_type" and values:
            unconverted[eqn.outvars[0]] = values[0]
        if name == "reduce_sum":
            shape, axes = operands[0].aval.shape, eqn.params["axes"]
            if not axes:
                means[eqn.outvars[0]] = values[0], "no axis, which is itself"
            elif shape[:1] == (1,) and 0 in axes and len(axes) < len(shape):
                means[eqn.outvars[0]] = values[0], "the leading axis, which has length one"
        elif name == "sub" and len(operands) == 2 and operands[1] in means:
            value, over = means[operands[1]]
            if value is values[0]:
                _refuse(of, eqn, f"it subtracts from a value its mean over {over}")
        elif len(operands) == 1 and operands[0] in means:
            means.update((v, means[operands[0]]) for v in eqn.outvars)


def _in_training(call: Any) -> bool:
    return not any(name.startswith("statistics") for name in call.argument_names())


def _refuse(of: str, eqn: Any, what: str) -> None:
    where = _jax.scope(eqn) or _jax.source_line(eqn) or "the model"
    raise ValueError(f"{of}: the examples mix: in {where}, {what} (batch norm in training mode). {REMEDY}")
