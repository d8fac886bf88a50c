"""Recurrent layers over a leading time axis, with backpropagation through time written out.

    p_t = x_t W + b                        the product for all steps at once, before the loop
    q_t = h_{t−1} U,   state_t = cell(p_t, q_t, state_{t−1})          t = 1 … T

Backwards the loop runs from T to 1 and hands down the cotangent of the state alone:

    p̄_t, q̄_t, ‥ = the cell's own pullback of (h̄_t, …),   h̄_{t−1} = q̄_t Uᵀ + ‥

and everything that concerns a parameter follows the loop as ONE product over time and batch together:

    W̄ = Σ_t x_tᵀ p̄_t,    Ū = Σ_t h_{t−1}ᵀ q̄_t,    b̄ = Σ_t p̄_t,    x̄_t = p̄_t Wᵀ

Autodiff adds up T products of the parameters' size inside of the loop.

| cell   | gates      | state                                                  |
|--------|------------|--------------------------------------------------------|
| `rnn`  |            | `h = tanh(p + q)`                                      |
| `gru`  | `r, z, n`  | `h = (1 − z) ⊙ n + z ⊙ h₋`, `n = tanh(p_n + r ⊙ q_n)`  |
| `lstm` | `i,f,g,o`  | `c = f ⊙ c₋ + i ⊙ g`, `h = o ⊙ tanh c`                 |

| `save`     | keeps                        | backward                                             |
|------------|------------------------------|------------------------------------------------------|
| `"all"`    | the output, the gates, `c`   | the default: the fastest, and less than autodiff     |
| `"output"` | the output, `c`              | the gates again, by two products for all steps       |

References: Werbos, "Backpropagation through time: what it does and how to do it", 1990; Appleyard et al.,
"Optimizing performance of recurrent neural networks on GPUs", 2016 (the products).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from funcprop.layers.linear_layers import LinearOperands, dense
from funcprop.program.dtypes import common_dtype
from funcprop.rules.equations import Equations, OperatorSymbols, apply
from funcprop.rules.layer import layer
from funcprop.rules.machine import Machine, host
from funcprop.rules.primitives.row_products import repeated
from funcprop.rules.rule import PLATFORMS, Rule

Save: TypeAlias = Literal["all", "output"]
State = tuple[Any, ...]  # the output `h` is last


class Cell(NamedTuple):
    """One step, and its pullback.

    `step(p, q, before) -> (after, kept)`; `pull(kept, h, cotangents) -> (p̄, ‥)` with the output `h` and the
    cotangents of `after`, where `‥` are those of `before` but for what comes by way of `q`;
    `recurrent(kept, p̄) -> q̄`. All are elementwise over leading axes, and so hold for one step and for all.
    """

    name: str
    gates: int
    states: int
    step: Callable[..., tuple[State, State]]
    pull: Callable[..., tuple[Any, State]]
    recurrent: Callable[..., Any]


def _parts(a: Any, count: int) -> list[Any]:
    return jnp.split(a, count, -1)


def _rnn_step(p: Any, q: Any, before: State) -> tuple[State, State]:
    return (jnp.tanh(p + q),), ()


def _rnn_pull(kept: State, h: Any, cotangents: State) -> tuple[Any, State]:
    (g,) = cotangents
    return g * (1 - h * h), (jnp.zeros_like(g),)


def _gru_step(p: Any, q: Any, before: State) -> tuple[State, State]:
    (p_r, p_z, p_n), (q_r, q_z, q_n) = _parts(p, 3), _parts(q, 3)
    r, z = jax.nn.sigmoid(p_r + q_r), jax.nn.sigmoid(p_z + q_z)
    n = jnp.tanh(p_n + r * q_n)
    return ((1 - z) * n + z * before[0],), (r, z, n, q_n, before[0])


def _gru_pull(kept: State, h: Any, cotangents: State) -> tuple[Any, State]:
    (r, z, n, q_n, before), (g,) = kept, cotangents
    of_n = g * (1 - z) * (1 - n * n)
    of_z = g * (before - n) * z * (1 - z)
    of_r = of_n * q_n * r * (1 - r)
    return jnp.concatenate([of_r, of_z, of_n], -1), (g * z,)


def _gru_recurrent(kept: State, p_cotangent: Any) -> Any:
    of_r, of_z, of_n = _parts(p_cotangent, 3)
    return jnp.concatenate([of_r, of_z, of_n * kept[0]], -1)


def _lstm_step(p: Any, q: Any, before: State) -> tuple[State, State]:
    i, f, g, o = _parts(p + q, 4)
    i, f, g, o = jax.nn.sigmoid(i), jax.nn.sigmoid(f), jnp.tanh(g), jax.nn.sigmoid(o)
    c = f * before[0] + i * g
    return (c, o * jnp.tanh(c)), (i, f, g, o, before[0])


def _lstm_pull(kept: State, h: Any, cotangents: State) -> tuple[Any, State]:
    (i, f, g, o, before), (of_c, of_h) = kept, cotangents
    squashed = jnp.tanh(f * before + i * g)
    of_c = of_c + of_h * o * (1 - squashed * squashed)
    parts = [
        of_c * g * i * (1 - i),
        of_c * before * f * (1 - f),
        of_c * i * (1 - g * g),
        of_h * squashed * o * (1 - o),
    ]
    return jnp.concatenate(parts, -1), (of_c * f, jnp.zeros_like(of_h))


def _same(kept: State, p_cotangent: Any) -> Any:
    return p_cotangent


RNN = Cell("rnn", 1, 1, _rnn_step, _rnn_pull, _same)
GRU = Cell("gru", 3, 1, _gru_step, _gru_pull, _gru_recurrent)
LSTM = Cell("lstm", 4, 2, _lstm_step, _lstm_pull, _same)


class Unrolled(NamedTuple):
    """The arguments and the outputs; of all steps, what the cell keeps or (`save="output"`) the states."""

    x: Any
    w: Any
    u: Any
    b: Any
    b_recurrent: Any
    initial: Any
    outputs: Any
    kept: Any
    states: Any


# --- both sweeps ------------------------------------------------------------------------------


def _affine(x: Any, w: Any, b: Any) -> Any:
    return dense.function(x, w, b)


def _first(x: Any, u: Any, states: int, dtype: Any, initial: Any) -> State:
    if initial is not None:
        return tuple(jnp.asarray(a, dtype) for a in initial)
    return (jnp.zeros((*x.shape[1:-1], u.shape[0]), dtype),) * states


def _before(first: Any, after: Any, reverse: bool) -> Any:
    """The states before each step, from those after it."""
    if not after.shape[0]:
        return after
    return jnp.concatenate([after[1:], first[None]] if reverse else [first[None], after[:-1]])


def _unroll(
    cell: Cell, x: Any, w: Any, u: Any, b: Any, b_recurrent: Any, initial: Any, *, reverse: bool, save: Save
) -> tuple[State, Unrolled]:
    """The last state, and all that is kept."""
    arguments = (x, w, u, b, b_recurrent)
    dtype = common_dtype(*arguments)

    def step(state: State, p: Any) -> Any:
        # The bias step by step: outside of the loop its sum would be a second array of p's size.
        p = p if b is None else p + b
        after, kept = cell.step(p, _affine(state[-1], u, b_recurrent), state)
        after = tuple(a.astype(dtype) for a in after)
        *others, h = after
        return after, (h, kept if save == "all" else None, others if save == "output" else None)

    first = _first(x, u, cell.states, dtype, initial)
    last, stacks = lax.scan(step, first, x @ w, reverse=reverse)
    return last, Unrolled(*arguments, initial, *stacks)


def _results(last: State, unrolled: Unrolled, return_state: bool) -> Any:
    return (unrolled.outputs, last) if return_state else unrolled.outputs


def _rule(cell: Cell, takes_recurrent_bias: bool) -> Rule:
    def arguments(*args: Any) -> tuple[Any, ...]:
        """With the recurrent bias that only some cells take."""
        return args if takes_recurrent_bias else (*args[:4], None, *args[4:])

    def forward(
        *args: Any, reverse: bool, return_state: bool, save: Save, machine: Machine | None = None
    ) -> tuple[Any, Unrolled]:
        last, unrolled = _unroll(cell, *arguments(*args), reverse=reverse, save=save)
        return _results(last, unrolled, return_state), unrolled

    def backward(
        residuals: Unrolled, g: Any, needs: Any, *, reverse: bool, return_state: bool, save: Save,
        machine: Machine | None = None,
    ) -> tuple[Any, ...]:  # fmt: skip
        x, w, u, b, b_recurrent, initial, outputs, kept, states = residuals
        need_x, need_w, need_u, need_b, need_recurrent, _ = arguments(*needs)
        dtype = outputs.dtype
        first = _first(x, u, cell.states, dtype, initial)
        h_before = _before(first[-1], outputs, reverse)
        if save == "output":
            pairs = zip(first[:-1], states, strict=True)
            before = (*(_before(a, s, reverse) for a, s in pairs), h_before)
            kept = cell.step(_affine(x, w, b), _affine(h_before, u, b_recurrent), before)[1]
        of_outputs, of_last = g if return_state else (g, tuple(map(jnp.zeros_like, first)))
        times_transposed = repeated(u.astype(dtype), math.prod(outputs.shape[1:-1]), machine or host())

        def step(cotangents: State, slices: Any) -> Any:
            of_output, kept, h = slices
            *others, of_h = cotangents
            of_p, (*others, rest) = cell.pull(kept, h, (*others, of_h + of_output))
            of_h = rest + times_transposed(cell.recurrent(kept, of_p))
            return tuple(a.astype(dtype) for a in (*others, of_h)), of_p

        slices = of_outputs, kept, outputs
        of_first, of_p = lax.scan(step, tuple(of_last), slices, reverse=not reverse)
        product: Any = dense.rule.backward
        of_x, of_w, of_b = product(LinearOperands(x, w, b), of_p, (need_x, need_w, need_b))
        operands = LinearOperands(h_before, u, b_recurrent)
        of_q = cell.recurrent(kept, of_p)
        _, of_u, of_recurrent = product(operands, of_q, (False, need_u, need_recurrent))
        of_initial = None
        if initial is not None:
            of_initial = tuple(c.astype(a.dtype) for c, a in zip(of_first, initial, strict=True))
        found = (of_x, of_w, of_u, of_b, of_recurrent, of_initial)
        return found if takes_recurrent_bias else (*found[:4], found[5])

    def equations(op: OperatorSymbols) -> Equations:
        leaves, tree = jax.tree.flatten(op.args)

        def pulled(which: int, g: Any, *values: Any) -> Any:
            args = jax.tree.unflatten(tree, values)
            needs = jax.tree.map(lambda _: True, args)
            cotangents = backward(forward(*args, **op.static)[1], g, needs, **op.static)
            return jax.tree.leaves(cotangents)[which]

        names = [f"through_time_{i}" for i in range(len(leaves))]
        back = [apply(n, partial(pulled, i), op.cotangent, *leaves) for i, n in enumerate(names)]
        value = apply(op.name, lambda *v: forward(*jax.tree.unflatten(tree, v), **op.static)[0], *leaves)
        return Equations(value, jax.tree.unflatten(tree, back))

    return Rule(forward, backward, equations, platforms=frozenset(PLATFORMS), pure=True, sized=True)


def _value(cell: Cell, x: Any, *args: Any, reverse: bool, return_state: bool, save: Save) -> Any:
    if save not in ("all", "output"):
        raise ValueError(f"{cell.name}: save={save!r} is not a saving policy; use 'all' or 'output'.")
    w, u, b, b_recurrent, initial = args
    width = jnp.shape(u)[0]
    expected = {"w": (jnp.shape(x)[-1], cell.gates * width), "u": (width, cell.gates * width)}
    for name, array in (("w", w), ("u", u)):
        if jnp.shape(array) != expected[name]:
            raise ValueError(
                f"{cell.name}: {name} has shape {jnp.shape(array)}, but {expected[name]} belongs to x with "
                f"{jnp.shape(x)[-1]} inputs and u with {width} units of {cell.gates} gates."
            )
    x, w, u = jnp.asarray(x), jnp.asarray(w), jnp.asarray(u)
    last, unrolled = _unroll(cell, x, w, u, b, b_recurrent, initial, reverse=reverse, save=save)
    return _results(last, unrolled, return_state)


def _init(cell: Cell, recurrent_bias: bool) -> Callable[..., dict[str, Any]]:
    def init(
        key: PRNGKeyArray, inputs: int, units: int, *, bias: bool = True, dtype: Any = None
    ) -> dict[str, Any]:
        """LeCun-normal `w`, an orthogonal `u` for each gate and, with `bias`, zeros; as in Flax."""
        dtype = dtype or float
        for_w, *for_u = jax.random.split(key, 1 + cell.gates)
        orthogonal = jax.nn.initializers.orthogonal()
        u = jnp.concatenate([orthogonal(k, (units, units), dtype) for k in for_u], -1)
        w = jax.nn.initializers.lecun_normal()(for_w, (inputs, cell.gates * units), dtype)
        zeros = jnp.zeros(cell.gates * units, dtype)
        biases = {"b": zeros, "b_recurrent": zeros} if recurrent_bias else {"b": zeros}
        return {"w": w, "u": u, **(biases if bias else {})}

    return init


# --- the layers -------------------------------------------------------------------------------


@layer(rule=_rule(RNN, False), init=_init(RNN, False))
def rnn(
    x: Float[Array, "time *batch inputs"],
    w: Float[Array, "inputs units"],
    u: Float[Array, "units units"],
    b: Float[Array, " units"] | None = None,
    initial: State | None = None,
    *,
    reverse: bool = False,
    return_state: bool = False,
    save: Save = "all",
) -> Any:
    """Elman's network, `h_t = tanh(x_t W + b + h_{t−1} U)`; the outputs of all steps, time first.

    The equations and what `save` keeps are in the module.

    Args:
        x: time first; batch axes are optional.
        w: input weights.
        u: recurrent weights.
        b: bias; none is 0.
        initial: the state before the first step, `(h,)`; none is 0.
        reverse: run from the last step to the first.
        return_state: also return the last state, as `(outputs, state)`.
        save: `"all"` or `"output"`.

    Raises:
        ValueError: the shapes of `w` and `u` do not fit, or `save` is unknown.

    Reference: Elman, "Finding structure in time", 1990; Werbos, "Backpropagation through time", 1990.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> y = fp.layers.rnn(jnp.ones((2, 1)), jnp.ones((1, 1)), jnp.ones((1, 1)))
        >>> [f"{h:.3f}" for h in y.ravel()]
        ['0.762', '0.943']
    """
    return _value(RNN, x, w, u, b, None, initial, reverse=reverse, return_state=return_state, save=save)


@layer(rule=_rule(GRU, True), init=_init(GRU, True))
def gru(
    x: Float[Array, "time *batch inputs"],
    w: Float[Array, "inputs gates"],
    u: Float[Array, "units gates"],
    b: Float[Array, " gates"] | None = None,
    b_recurrent: Float[Array, " gates"] | None = None,
    initial: State | None = None,
    *,
    reverse: bool = False,
    return_state: bool = False,
    save: Save = "all",
) -> Any:
    """Gated recurrent unit; the gates of `w`, `u` and the biases in the order `r, z, n`.

    `r = σ(p_r + q_r)`, `z = σ(p_z + q_z)`, `n = tanh(p_n + r ⊙ q_n)`, `h = (1 − z) ⊙ n + z ⊙ h₋` with
    `p = x W + b`, `q = h₋ U + b_recurrent`, as in cuDNN and PyTorch; in Flax the recurrent bias is `n`'s.
    Other arguments as of `rnn`.

    Raises:
        ValueError: the shapes of `w` and `u` do not fit, or `save` is unknown.

    Reference: Cho et al., "Learning phrase representations using RNN encoder-decoder", 2014.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> y = fp.layers.gru(jnp.ones((2, 1)), jnp.ones((1, 3)), jnp.ones((1, 3)))
        >>> [f"{h:.3f}" for h in y.ravel()]
        ['0.205', '0.347']
    """
    options: dict[str, Any] = {"reverse": reverse, "return_state": return_state, "save": save}
    return _value(GRU, x, w, u, b, b_recurrent, initial, **options)


@layer(rule=_rule(LSTM, False), init=_init(LSTM, False))
def lstm(
    x: Float[Array, "time *batch inputs"],
    w: Float[Array, "inputs gates"],
    u: Float[Array, "units gates"],
    b: Float[Array, " gates"] | None = None,
    initial: State | None = None,
    *,
    reverse: bool = False,
    return_state: bool = False,
    save: Save = "all",
) -> Any:
    """Long short-term memory; the gates of `w`, `u` and `b` in the order `i, f, g, o`, as in Flax.

    `c = f ⊙ c₋ + i ⊙ g`, `h = o ⊙ tanh c`, with `i, f, o = σ(·)`, `g = tanh(·)` of `x W + b + h₋ U`. The
    state is `(c, h)`. Other arguments as of `rnn`.

    Raises:
        ValueError: the shapes of `w` and `u` do not fit, or `save` is unknown.

    References: Hochreiter and Schmidhuber, "Long short-term memory", 1997; Gers et al., "Learning to forget",
    2000 (the forget gate).

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> y = fp.layers.lstm(jnp.ones((2, 1)), jnp.ones((1, 4)), jnp.ones((1, 4)))
        >>> [f"{h:.3f}" for h in y.ravel()]
        ['0.370', '0.651']
    """
    return _value(LSTM, x, w, u, b, None, initial, reverse=reverse, return_state=return_state, save=save)
