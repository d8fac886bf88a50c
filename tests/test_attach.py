"""Rules at work: what is saved, what is asked of the backward, and the errors of a rule that does not fit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcprop as fp

X, W = jnp.arange(6.0).reshape(2, 3), jnp.ones((3, 2))


def forward(x, params):
    return x @ params["w"], (x, params["w"])


def backward(residuals, cotangent, needs):
    x, w = residuals
    return cotangent @ w.T, {"w": x.T @ cotangent}


def gradient(forward=forward, backward=backward, **rule):
    """The gradient of a product whose rule is under test, in both arguments."""

    @fp.layer(rule=fp.Rule(forward, backward, **rule))
    def product(x, params):
        return x @ params["w"]

    def loss(x, params):
        return jnp.sum(jnp.sin(product(x, params)))

    return fp.grad(loss, argnums=(0, 1), rules=fp.rules.handwritten)(X, {"w": W})


def test_correct_rule():
    x, params = jax.grad(lambda x, w: jnp.sum(jnp.sin(x @ w)), argnums=(0, 1))(X, W)
    actual = gradient()
    np.testing.assert_allclose(actual[0], x, rtol=1e-12)
    np.testing.assert_allclose(actual[1]["w"], params, rtol=1e-12)


# What is wrong with the rule, and what the error must say: the rule, the argument, the remedy.
WRONG_RULES = {
    "shape": (
        {"backward": lambda r, ct, needs: (ct, {"w": r[0].T @ ct})},
        r"product: the cotangent of argument 'x' has shape \(2, 2\) but the argument has \(2, 3\); sum it",
    ),
    "shape in a pytree": (
        {"backward": lambda r, ct, needs: (ct @ r[1].T, {"w": (r[0].T @ ct).T})},
        r"product: the cotangent of argument \"params\['w'\]\" has shape \(2, 3\)",
    ),
    "dtype": (
        {"backward": lambda r, ct, needs: ((ct @ r[1].T).astype(jnp.float32), {"w": r[0].T @ ct})},
        r"argument 'x' has dtype float32 but the argument has float64; .*astype\(jnp.float64\)",
    ),
    "structure": (
        {"backward": lambda r, ct, needs: (ct @ r[1].T, {"weight": r[0].T @ ct})},
        r"structure is not that of the arguments .*Return one array for every array of the argument",
    ),
    "count": (
        {"backward": lambda r, ct, needs: (ct @ r[1].T,)},
        r"backward returned a tuple of length 1 for 2 arguments .*one cotangent for each argument",
    ),
    "no tuple": (
        {"backward": lambda r, ct, needs: ct @ r[1].T},
        r"(?s)backward returned .* for 2 arguments .*return a tuple",
    ),
    "no array": (
        {"backward": lambda r, ct, needs: ("cotangent", {"w": r[0].T @ ct})},
        r"argument 'x' is 'cotangent'; return an array of type float64\[2, 3\]",
    ),
    "residual is no array": (
        {"forward": lambda x, params: (x @ params["w"], {"x": x, "mode": "fast"})},
        r"residual \['mode'\]='fast' is not an array; save arrays only",
    ),
    "forward is no pair": (
        {"forward": lambda x, params: x @ params["w"]},
        r"(?s)forward returned .*; return the pair \(results, residuals\)",
    ),
    "forward shape": (
        {"forward": lambda x, params: ((x @ params["w"])[0], (x, params["w"]))},
        r"forward returned \(float64\[2\]\) where the operator returns \(float64\[2, 2\]\)",
    ),
    "forward dtype": (
        {"forward": lambda x, params: ((x @ params["w"]).astype(jnp.float32), (x, params["w"]))},
        r"forward returned \(float32\[2, 2\]\) where the operator returns \(float64\[2, 2\]\)",
    ),
    "forward count": (
        {"forward": lambda x, params: ((x @ params["w"], x), (x, params["w"]))},
        r"forward returned \(float64\[2, 2\], float64\[2, 3\]\) where the operator returns",
    ),
    "applies": (
        {"applies": lambda x, params: None},
        r"applies returned None; return True, or a string",
    ),
    "no function": (
        {"backward": None},
        r"Rule: backward=None is not callable",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("wrong", "message"), WRONG_RULES.values(), ids=WRONG_RULES)
def test_wrong_rule_is_an_error(wrong, message):
    with pytest.raises(fp.RuleError, match=message):
        gradient(**wrong)


@pytest.mark.parametrize(
    ("argnums", "needs", "saved"),
    [
        ((0,), (True, {"w": False}), [W.shape]),
        ((1,), (False, {"w": True}), [X.shape]),
        ((0, 1), (True, {"w": True}), [X.shape, W.shape]),
    ],
)
def test_only_what_is_needed_is_computed_and_saved(argnums, needs, saved):
    seen = []

    def only_needed(residuals, cotangent, needs):
        seen.append(needs)
        x, w = residuals
        return cotangent @ w.T if needs[0] else None, {"w": x.T @ cotangent if needs[1]["w"] else None}

    @fp.layer(rule=fp.Rule(forward, only_needed))
    def product(x, params):
        return x @ params["w"]

    def of_some(*some):
        args = [X, {"w": W}]
        for i, argument in zip(argnums, some, strict=True):
            args[i] = argument
        return product(*args)

    def pullback(*some):
        return fp.vjp(of_some, *some, rules=fp.rules.handwritten)[1]

    some = [(X, {"w": W})[i] for i in argnums]
    assert [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(pullback, *some))] == saved
    assert seen[-1] == needs
    actual, expected = pullback(*some)(X @ W), jax.vjp(of_some, *some)[1](X @ W)
    jax.tree.map(np.testing.assert_allclose, actual, expected)


def test_a_backward_may_ignore_a_cotangent_and_a_value_that_it_closes_over():
    """Two results, of which the rule says that one is constant; and a traced number that is read in vain."""

    def loss(x, factor):
        def backward(residuals, cotangents, needs):
            factor * cotangents[1]
            return (3 * cotangents[0],)

        @fp.layer(rule=fp.Rule(lambda x: ((3 * x, jnp.floor(x)), ()), backward))
        def split(x):
            return 3 * x, jnp.floor(x)

        whole, rest = split(x)
        return jnp.sum(whole**2) + factor * jnp.sum(rest)

    gradient = fp.grad(loss, (0, 1), rules=fp.rules.handwritten)
    for found in (gradient(X, 2.0), jax.jit(gradient)(X, 2.0)):
        np.testing.assert_allclose(found[0], 18 * X)
        np.testing.assert_allclose(found[1], jnp.sum(X))


def test_rule_that_does_not_apply_is_left_to_autodiff():
    def fails(*_, **__):
        raise AssertionError("must not be called")

    actual = gradient(fails, fails, applies=lambda x, params: f"{x.shape} is too small")
    np.testing.assert_allclose(actual[0], gradient()[0])

    @fp.layer(rule=fp.Rule(fails, fails, applies=lambda x: "too small" if x.size < 9 else True))
    def layer(x):
        return jnp.sin(x)

    (match,) = fp.matches(layer, fp.rules.handwritten)(X)
    assert (match.operator, match.reason) == ("layer", "too small")


def test_own_forward_mode_is_used():
    """A rule's `jvp` is what forward mode runs; reverse mode runs the backward."""

    @fp.layer(
        rule=fp.Rule(
            lambda x: (jnp.sin(x), x),
            lambda x, ct, needs: (2 * ct * jnp.cos(x),),
            jvp=lambda x, tangents: 3 * tangents[0] * jnp.cos(x),
        )
    )
    def layer(x):
        return jnp.sin(x)

    ruled = fp.with_rules(layer, fp.rules.handwritten)
    np.testing.assert_allclose(jax.jvp(ruled, (X,), (X,))[1], 3 * X * jnp.cos(X))
    np.testing.assert_allclose(jax.vjp(ruled, X)[1](X)[0], 2 * X * jnp.cos(X))


def test_shared_argument_under_vmap_has_no_batch_of_its_cotangent():
    """A parameter's cotangent is contracted over the batch, not made for every example and summed."""

    def loss(params, x):
        @fp.layer(rule=fp.Rule(forward, backward))
        def product(x, params):
            return x @ params["w"]

        return jnp.sum(jax.vmap(product, in_axes=(0, None))(x, params) ** 2)

    batch = jnp.ones((7, *X.shape))
    jaxpr = str(jax.make_jaxpr(fp.grad(loss, rules=fp.rules.handwritten))({"w": jnp.ones((3, 5))}, batch))
    assert "f64[7,3,5]" not in jaxpr
