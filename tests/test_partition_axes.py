"""The logical axes of models, and why some cannot be split."""

from __future__ import annotations

import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from partition_models import MODELS

import funcprop as fp


def axes_of(name: str) -> Any:
    loss, params, batch = MODELS[name]()
    return fp.partition.axes(loss)(params, batch)


def test_the_axes_of_a_transformer_are_megatrons() -> None:
    axes = axes_of("tied")
    attention = "params/params/MultiHeadDotProductAttention_0"
    heads = axes[f"{attention}/query/kernel[1]"]
    assert heads.why is None
    assert heads.size == 4
    assert {f"{attention}/{name}/kernel[1]" for name in ("query", "key", "value")} <= set(heads.members)
    assert f"{attention}/out/kernel[0]" in heads.members
    hidden = axes["params/params/Dense_0/kernel[1]"]
    assert {"params/params/Dense_0/bias[0]", "params/params/Dense_1/kernel[0]"} <= set(hidden.members)
    assert "it meets itself: twice in" in axes["batch/0[1]"].why
    assert axes["batch/0[0]"].members == ("batch/0[0]", "batch/1[0]")
    assert axes["params/params/Embed_0/embedding[0]"].why is None
    with pytest.raises(KeyError, match="print\\(axes\\) lists them"):
        axes["nothing"]


@pytest.mark.parametrize(
    ("name", "member", "why"),
    [
        ("cnn", "batch/0[1]", "space of a convolution"),
        ("cnn", "params/params/Dense_0/kernel[0]", None),
        ("lstm", "batch/0[1]", "the steps of a loop"),
        ("lstm", "params/params/OptimizedLSTMCell_0/hf/kernel[1]", "such as gates in one weight"),
    ],
)
def test_what_cannot_be_split_says_why(name: str, member: str, why: str | None) -> None:
    found = axes_of(name)[member].why
    assert (why is None and name == "cnn") or why in found
    assert str(axes_of(name)).count("\n") >= len(axes_of(name))


def test_a_fused_projection_an_unknown_operator_and_experts() -> None:
    def fused(w: Any, x: Any) -> Any:
        q, k, v = jnp.split(x @ w, 3, axis=-1)
        return jnp.mean(q * k + v)

    axes = fp.partition.axes(fused)(jnp.ones((4, 12)), jnp.ones((8, 4)))
    assert "such as a fused QKV" in axes["params[1]"].why
    assert axes["batch[0]"].why is None

    def solved(w: Any, x: Any) -> Any:
        return jnp.mean(jnp.linalg.cholesky(x) @ w)

    axes = fp.partition.axes(solved, rules=fp.rules.autodiff)(jnp.ones((4, 5)), jnp.ones((8, 4, 4)))
    assert "`cholesky` is not known to the partitioner" in axes["batch[0]"].why

    def experts(w: Any, x: Any) -> Any:
        gates = jax.nn.softmax(x @ w["gate"])
        return jnp.mean(jnp.einsum("be,bi,eio->bo", gates, x, w["experts"]) ** 2)

    w = {"gate": jnp.ones((4, 6)), "experts": jnp.ones((6, 4, 3))}
    axes = fp.partition.axes(experts)(w, jnp.ones((8, 4)))
    assert set(axes["params/gate[1]"].members) == {"params/gate[1]", "params/experts[0]"}
    assert axes["params/gate[1]"].why is None


def test_examples_pass_through_dropout_stacks_and_tiles() -> None:
    def loss(w: Any, x: Any) -> Any:
        kept = jax.random.bernoulli(jax.random.key(0), 0.5, x.shape)
        a, b = jnp.unstack(jnp.stack([x @ w, jnp.tile(jnp.where(kept, x, 0.0), (1, 2))], axis=1), axis=1)
        return jnp.mean(a * b)

    w, x = jnp.ones((4, 8)), jnp.arange(64.0).reshape(16, 4)
    assert fp.partition.axes(loss)(w, x)["batch[0]"].why is None
    (plan,) = fp.partition.plan(loss, mesh={"data": 8})(w, x)
    proof = plan.compile()
    assert proof.gradient_error is not None
    assert proof.gradient_error <= 1e-12
    assert proof.unpredicted == []


def test_equal_layers_do_not_share_axes() -> None:
    """JAX keeps the traced body of one relu for both calls; the hidden axes are two all the same."""
    axes = axes_of("equinox")
    assert axes["params/layers/0/weight[0]"] is not axes["params/layers/1/weight[0]"]
    assert axes["params/layers/0/weight[0]"].why is None


def test_json_and_print() -> None:
    axes = axes_of("mlp")
    assert len(json.loads(axes.json())["axes"]) == len(axes)
    assert "cannot be split because" in str(axes).splitlines()[0]


def test_a_batch_may_be_given_as_to_the_loss() -> None:
    def loss(w, x, y):
        return jnp.mean((jnp.tanh(x @ w) - y) ** 2)

    w, x, y = jnp.eye(4), jnp.ones((8, 4)), jnp.ones((8, 4))
    planner = fp.partition.plan(loss, mesh={"data": 8})
    assert planner(w, x, y)[0].predicted == planner(w, (x, y))[0].predicted
    assert str(fp.partition.axes(loss)(w, x, y)) == str(fp.partition.axes(loss)(w, (x, y)))
    for data, shown in (((), "params"), ((x, y, 8), "params, …, …, 8")):
        message = f"plan(loss)({shown}): pass the parameters and the batch, and how many devices by keyword"
        with pytest.raises(TypeError, match=re.escape(message)):
            planner(w, *data)


def test_a_linear_solve_is_no_error() -> None:
    """Its parameters are a named tuple of programs."""
    loss = lambda w, x: jnp.mean(jnp.linalg.solve(w @ w.T + jnp.eye(4), x.T) ** 2)  # noqa: E731
    (plan,) = fp.partition.plan(loss, mesh={"data": 1}, by="estimate")(jnp.eye(4), jnp.ones((8, 4)))
    assert plan.flops > 0
    assert plan.predicted.total > 0
