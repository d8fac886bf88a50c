"""Wrong equations are caught, beside NaN and infinity too; ill-formed ones are refused."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import funcprop as fp
from funcprop.equations.verification import DerivationError
from funcprop.rules.equations import Equations, apply

NOT_FINITE = {
    "NaN": (lambda x: jnp.sum(jnp.log(x) * jnp.sqrt(x)), [1.0, -1.0, 0.0, 4.0]),
    "infinities": (lambda x: jnp.sum(1 / x) + jnp.sum(x), [1.0, 0.0, -0.0, 3.0]),
    "of a product": (lambda x: jnp.sum((x[:, None] * x) @ x), [1.0, jnp.inf, 2.0]),
    "complex": (lambda x: jnp.real(jnp.sum(1 / (x + 0j) * 1j)), [0.0, 2.0]),
}


@pytest.mark.parametrize("case", NOT_FINITE)
def test_values_that_are_not_finite(case):
    loss, x = NOT_FINITE[case]
    x = jnp.array(x)
    derivation = fp.derive(loss, detail="operators")(x)
    assert not np.all(np.isfinite(fp.backprop(loss)(x).gradient))
    errors = derivation.verify().errors
    assert max(errors.values()) < 1e-13


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        (lambda g, x: 1.001 * g, "0.00[0-9]*"),  # a finite entry beside infinities and NaN
        (lambda g, x: jnp.where(jnp.isnan(g), 0, g), "inf"),
        (lambda g, x: jnp.where(jnp.isinf(g), -g, g), "inf"),
        (lambda g, x: jnp.where(x == 4, jnp.nan, g), "inf"),
    ],
)
def test_mistakes_beside_what_is_not_finite_are_caught(wrong, found):
    function = jnp.sqrt

    def slope(x):
        return 0.5 / jnp.sqrt(x)

    rule = fp.Rule(
        lambda x: (function(x), x),
        lambda x, g, needs: (g * slope(x),),
        lambda op: Equations(
            apply("f", function, op.args[0]),
            (apply("g", lambda x, g: wrong(g * slope(x), x), op.args[0], op.cotangent),),
        ),
    )
    layer = fp.layer(rule=rule)(function)
    derivation = fp.derive(lambda x: jnp.sum(layer(x)))(jnp.array([1.0, 0.0, -1.0, 4.0]))
    with pytest.raises(DerivationError, match=f"deviates from autodiff by {found} relative to the largest"):
        derivation.verify()


WRONG = {
    "forward": lambda e: e._replace(forward=2 * e.forward),
    "transposed": lambda e: e._replace(backward=(e.backward[0], e.backward[1].T)),
    "off by 0.1 %": lambda e: e._replace(backward=(1.001 * e.backward[0], e.backward[1])),
}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("mistake", WRONG)
def test_wrong_equations_are_caught(mistake, dtype):
    def equations(op):
        a, b = op.args
        return WRONG[mistake](Equations(a @ b, (op.cotangent @ b.T, a.T @ op.cotangent)))

    rule = fp.Rule(
        forward=lambda a, b: (a @ b, (a, b)),
        backward=lambda operands, g, needs: (g @ operands[1].T, operands[0].T @ g),
        equations=equations,
    )

    @fp.layer(rule=rule)
    def product(a, b):
        return a @ b

    a, b = jnp.array([[1.0, 2.0], [3.0, 5.0]]), jnp.array([[2.0, 0.0], [1.0, 4.0]])
    # A result that is rounded to single precision is not taken for a backward that is not linear.
    weights = jnp.asarray([[1.0, 0.7], [-0.3, 0.9]], dtype)
    derivation = fp.derive(lambda a, b: jnp.sum(product(a, b).astype(dtype) * weights), (0, 1))(a, b)
    with pytest.raises(DerivationError, match=r"form \d of `.*` deviates from autodiff by"):
        derivation.verify()


def scaled(x, factor, shift=None):
    y = x * factor
    return y if shift is None else y + shift


ILL_FORMED = {
    "no Equations": (
        lambda op: (op.args[0], (op.cotangent, None)),
        fp.RuleError,
        r"rule for scaled: the equations are a tuple; return `Equations\(",
    ),
    "too few": (
        lambda op: Equations(op.args[0], (op.cotangent,)),
        fp.RuleError,
        r"rule for scaled: .* one cotangent for every array of \('x', 'factor'\)",
    ),
    "one for None": (
        lambda op: Equations(op.args[0], (op.cotangent, op.cotangent, op.cotangent)),
        fp.RuleError,
        "rule for scaled: .* None for an argument that is None",
    ),
    "None as a term": (
        lambda op: Equations(op.args[0] + op.args[2], (op.cotangent, None, None)),
        TypeError,
        "None is neither a symbol nor a number; .* leave out an argument that is None",
    ),
    "a function of arrays": (
        lambda op: Equations(jnp.sin(op.args[0]), (op.cotangent, None, None)),
        TypeError,
        r"symbols know .* `apply\(name, function, \*symbols\)`",
    ),
}


@pytest.mark.parametrize("mistake", ILL_FORMED)
def test_ill_formed_equations_are_refused_with_the_name_of_their_rule(mistake):
    equations, kind, message = ILL_FORMED[mistake]
    layer = fp.layer(rule=fp.Rule(lambda *args: (scaled(*args), args), lambda *_: (), equations))(scaled)
    with pytest.raises(kind, match=message) as raised:
        fp.derive(lambda x, factor: jnp.sum(layer(x, factor) ** 2), (0, 1))(jnp.ones(3), jnp.ones(3))
    found = str(raised.value) + "".join(getattr(raised.value, "__notes__", ()))
    assert "rule for scaled" in found
