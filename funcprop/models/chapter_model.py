"""The chapter's model: one hidden layer, one example, weight decay, in the chapter's own orientation.

    z = W1 x (+ b)    h = φ(z)    o = W2 h    L = l(o, y)    s = λ/2 (‖W1‖²_F + ‖W2‖²_F)    J = L + s

Reference: Zhang et al., *Dive into Deep Learning*, section 5.3.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact, Int, PRNGKeyArray

from funcprop import layers
from funcprop.graph.graph import name
from funcprop.rules.equations import Equations, OperatorSymbols, apply, opaque
from funcprop.rules.layer import layer


@layer(rule=layers.tanh.rule)
def φ(z: Inexact[Array, " h"]) -> Inexact[Array, " h"]:
    """The chapter's activation; here the hyperbolic tangent."""
    return jnp.tanh(z)


def _loss_equations(op: OperatorSymbols) -> Equations:
    o, y = op.args
    loss = layers.softmax_cross_entropy.function
    slope = opaque(
        lambda o, y: jax.grad(lambda o: loss(o, y))(o),
        (o, y),
        f"∂{op.output.text()}/∂{o.text()}",
        f"\\frac{{\\partial {op.output.latex()}}}{{\\partial {o.latex()}}}",
    )
    return Equations(apply("l", loss, o, y), (op.cotangent * slope, None))


@layer(rule=replace(layers.softmax_cross_entropy.rule, equations=_loss_equations))
def l(o: Inexact[Array, " q"], y: Int[Array, ""]) -> Inexact[Array, ""]:  # noqa: E743
    """The chapter's loss of one example; here the cross-entropy of the softmax."""
    return layers.softmax_cross_entropy.function(o, y)


def chapter(
    params: dict[str, Any], x: Inexact[Array, " d"], y: Int[Array, ""], decay: Inexact[Array, ""]
) -> Inexact[Array, ""]:
    """The objective `J = l(W2 φ(W1 x + b), y) + λ/2 (‖W1‖²_F + ‖W2‖²_F)` of one example.

    Args:
        params: `W1: h × d`, `W2: q × h`, and optionally the hidden bias `b: h` (exercise 2), which is not
            decayed.
        x: input, `d`.
        y: label, an integer below `q`.
        decay: `λ`, the strength of the weight decay; an input, so that it is a node of the graph.

    Example:
        >>> import jax, jax.numpy as jnp, funcprop as fp
        >>> params = fp.models.init_chapter(jax.random.key(0), inputs=3, hidden=4, outputs=2)
        >>> p = fp.backprop(fp.models.chapter)(params, jnp.ones(3), jnp.array(1), 0.1)
        >>> list(p.values), list(p.gradients)
        (['z', 'h', 'o', 'L', 's', 'J'], ['L', 's', 'o', 'W2', 'h', 'z', 'W1'])
    """
    z = name(layers.linear(params["W1"], x, params.get("b")), "z")
    h = name(φ(z), "h")
    o = name(layers.linear(params["W2"], h), "o")
    L = name(l(o, y), "L")
    s = name(layers.l2_penalty(decay, (params["W1"], params["W2"])), "s")
    return name(L + s, "J")


chapter.__symbols__ = {"decay": "λ"}  # type: ignore[attr-defined]


def init_chapter(
    key: PRNGKeyArray, inputs: int, hidden: int, outputs: int, *, bias: bool = False
) -> dict[str, Any]:
    """Parameters of the chapter's model: He-normal `W1`, `W2`, and zeros `b` with `bias`.

    Example:
        >>> import jax, funcprop as fp
        >>> params = fp.models.init_chapter(jax.random.key(0), inputs=3, hidden=4, outputs=2, bias=True)
        >>> {name: value.shape for name, value in params.items()}
        {'W1': (4, 3), 'W2': (2, 4), 'b': (4,)}
    """
    first, second = jax.random.split(key)
    hidden_layer = layers.linear.init(first, hidden, inputs, bias=bias)
    params = {"W1": hidden_layer["w"], "W2": layers.linear.init(second, outputs, hidden)["w"]}
    return {**params, "b": hidden_layer["b"]} if bias else params
