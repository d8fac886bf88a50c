"""What `fp.per_example` refuses: models that mix the examples, and calls that cannot be meant."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import funcprop as fp


def test_mixing_is_refused():
    x, y = jnp.ones((4, 3)), jnp.zeros(4)
    loss = lambda o, y: jnp.sum(o - y) ** 2  # noqa: E731
    with pytest.raises(
        ValueError, match=r"examples mix: the model reduces over a named axis.*batch.*evaluation"
    ):
        fp.per_example(lambda w, x: w * (x - jax.lax.pmean(x, "batch")), loss)(jnp.ones(3), x, y, ["norm"])
    norm = nn.BatchNorm(use_running_average=False, param_dtype=float)
    variables = norm.init(jax.random.key(0), x)

    def training(params, x):
        return norm.apply({**variables, "params": params}, x[None], mutable=["batch_stats"])

    with pytest.raises(ValueError, match=r"examples mix: in .*subtracts from a value its mean.*length one"):
        fp.per_example(lambda p, x: training(p, x)[0][0], loss)(variables["params"], x, y, ["norm"])
    vector = lambda p, x: norm.apply({**variables, "params": p}, x, mutable=["batch_stats"])[0]  # noqa: E731
    with pytest.raises(ValueError, match=r"examples mix: in .*subtracts from a value its mean over no axis"):
        fp.per_example(vector, loss)(variables["params"], x, y, ["norm"])
    half = nn.BatchNorm(use_running_average=False, dtype=jnp.float16, param_dtype=jnp.float16)
    params, short = jax.tree.map(jnp.float16, variables["params"]), x.astype(jnp.float16)
    for call, over in ((lambda x: x[None], "the leading axis"), (lambda x: x, "no axis")):
        model = lambda p, x, call=call: half.apply(  # noqa: E731
            {**variables, "params": p}, call(x), mutable=["batch_stats"]
        )[0]
        with pytest.raises(ValueError, match=f"subtracts from a value its mean over {over}"):
            fp.per_example(model, loss)(params, short, y.astype(jnp.float16), ["norm"])
    with pytest.raises(ValueError, match=r"output\[1\], which loss\(output, y\) does not read"):
        fp.per_example(lambda w, x: (w * x, x.mean()), lambda o, y: loss(o[0], y))(
            jnp.ones(3), x, y, ["norm"]
        )
    with pytest.raises(ValueError, match="batch_norm` computes its statistics"):
        fp.per_example(lambda w, x: w * fp.layers.batch_norm(x[None])[0][0], loss)(
            jnp.ones(3), x, y, ["norm"]
        )
    evaluating = nn.BatchNorm(use_running_average=True, param_dtype=float)
    apply = lambda p, x: evaluating.apply({**variables, "params": p}, x[None])[0]  # noqa: E731
    assert fp.per_example(apply, loss)(variables["params"], x, y, ["norm"])["norm"]["scale"].shape == (4,)


def test_errors():
    quantities = fp.per_example(lambda w, x: w * x, lambda o, y: jnp.sum((o - y) ** 2))
    w, x, y = jnp.ones(2), jnp.ones((3, 2)), jnp.ones((3, 2))
    with pytest.raises(ValueError, match=r"unknown quantity 'norms' \(did you mean 'norm'\?\).*diag_ggn"):
        quantities(w, x, y, ["norms"])
    with pytest.raises(ValueError, match="quantities='norm'; pass a set"):
        quantities(w, x, y, "norm")
    with pytest.raises(ValueError, match="leading axis of x and y is the examples, but x has 3, y has 2"):
        quantities(w, x, y[:2], ["norm"])
    with pytest.raises(ValueError, match=r"'kfac' is an estimate by random signs; pass key="):
        quantities(w, x, y, ["kfac"])
    with pytest.raises(TypeError, match=r"the parameter 'n' is int64, which has no real derivative"):
        quantities({"n": jnp.ones(2, int)}, x, y, ["norm"])
    with pytest.raises(TypeError, match="it must return a floating-point scalar"):
        fp.per_example(lambda w, x: w * x, lambda o, y: o - y)(w, x, y, ["norm"])
    one = quantities(w, x[:1], y[:1], ["variance", "batch_gradients"])
    assert not one["variance"].any()
    assert one["batch_gradients"].shape == (1, 2)


def similarities(w, x):
    """Of a batch of one they have another shape."""
    z = x @ w
    return z @ z.T[:, :3]


def squared(outputs, y):
    return jnp.mean((outputs - y) ** 2)


OF_SIMILARITIES = {
    "per_example": lambda *args: fp.per_example(similarities, squared, batched=True)(*args, {"norm"}),
    "kfac": fp.kfac(similarities, squared, batched=True, kind="exact"),
    "laplace": fp.curvature.laplace(similarities, "gaussian", batched=True),
}


@pytest.mark.parametrize("ask", OF_SIMILARITIES.values(), ids=OF_SIMILARITIES)
def test_outputs_that_depend_on_how_many_examples_there_are(ask):
    message = r"the examples mix: .*similarities returns \[1, 1\], of two \[2, 2\]"
    with pytest.raises(ValueError, match=message):
        ask(jnp.ones((2, 2)), jnp.ones((4, 2)), jnp.ones((4, 3)))
