"""`fp.derive`: the chapter line by line, exercise 2, other models, and operators of all kinds."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equation_lines import BACKWARD, FORWARD, chapter, texts

import funcprop as fp


def test_the_chapter_line_by_line():
    derivation = fp.derive(fp.models.chapter)(*chapter())
    assert texts(derivation.forward) == FORWARD
    assert texts(derivation.backward) == BACKWARD
    verified = derivation.verify()
    assert len(verified.errors) == len(FORWARD) + len(BACKWARD)
    assert max(verified.errors.values()) < 1e-14


def test_text_shows_the_shapes():
    lines = fp.derive(fp.models.chapter)(*chapter()).text().splitlines()
    shapes = {
        line.split(" = ")[0].strip(): line.rsplit("(", 1)[1].rstrip(")") for line in lines if "=" in line
    }
    assert shapes["z"] == shapes["h"] == shapes["∂J/∂h"] == "4"
    assert shapes["∂J/∂W2"] == shapes["∂s/∂W2"] == "2 × 4"
    assert shapes["∂J/∂W1"] == "4 × 3"
    assert shapes["J"] == shapes["∂J/∂L"] == "scalar"
    assert (lines[0], lines[8]) == ("Forward propagation", "Backpropagation")


def test_exercise_2_a_bias_in_the_hidden_layer():
    derivation = fp.derive(fp.models.chapter)(*chapter(bias=True))
    assert texts(derivation.forward) == ["z = W1 x + b", *FORWARD[1:]]
    assert texts(derivation.backward) == [*BACKWARD, "∂J/∂b = prod(∂J/∂z, ∂z/∂b) = ∂J/∂z"]
    derivation.verify()


def test_a_bias_over_a_batch_is_summed():
    params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}

    def loss(params, x):
        z = fp.name(fp.layers.dense(x, params["w"], params["b"]), "z")
        return fp.layers.mean_squared_error(z, jnp.zeros((4, 2)))

    derivation = fp.derive(loss)(params, jnp.ones((4, 3)))
    assert "∂J/∂b = prod(∂J/∂z, ∂z/∂b) = sum(∂J/∂z, axis 0)" in texts(derivation.backward)
    assert "∂J/∂w = prod(∂J/∂z, ∂z/∂w) = xᵀ ∂J/∂z" in texts(derivation.backward)
    derivation.verify()


def test_a_three_layer_residual_network():
    block = fp.models.residual(
        fp.models.sequential(fp.models.dense(3, 3), fp.models.elementwise(fp.layers.gelu))
    )
    net = fp.models.sequential(block, block, block)

    def loss(params, x, t):
        return fp.layers.mean_squared_error(net.apply(params, x), t)

    args = net.init(jax.random.key(0)), jnp.arange(6.0).reshape(2, 3), jnp.ones((2, 3))
    derivation = fp.derive(loss, detail="operators")(*args)
    derivation.verify()
    skip = next(line for line in derivation.backward if line.left == "∂J/∂add")
    assert skip.text() == (
        "∂J/∂add = prod(∂J/∂dense_1, ∂dense_1/∂add) + prod(∂J/∂add_1, ∂add_1/∂add)"
        " = ∂J/∂dense_1 params/1/0/wᵀ + ∂J/∂add_1"
    )
    assert sum(line.left.endswith("/w") for line in derivation.backward) == 3


def test_an_operator_without_equations_leaves_prod_alone():
    def loss(x):
        return fp.name(jnp.sum(fp.name(jnp.cumsum(x), "c")), "J")

    derivation = fp.derive(loss, detail="operators")(jnp.arange(3.0))
    assert texts(derivation.forward)[0] == "c = cumsum(x)"
    assert texts(derivation.backward)[-1] == "∂J/∂x = prod(∂J/∂c, ∂c/∂x)"
    derivation.verify()


def test_a_sum_keeps_prod_for_the_part_without_equations():
    def loss(x):
        c = fp.name(jnp.cumsum(x), "c")
        return fp.name(jnp.sum(fp.name(c * x, "p")), "J")

    line = fp.derive(loss, detail="operators")(jnp.arange(3.0)).backward[-1].text()
    assert line == "∂J/∂x = prod(∂J/∂c, ∂c/∂x) + prod(∂J/∂p, ∂p/∂x) = prod(∂J/∂c, ∂c/∂x) + ∂J/∂p ⊙ c"


PRIMITIVES = {
    "arithmetic": lambda x, y: jnp.sum((x * y - x / y + 2 * x - 3) ** 3 + (-x) ** 2),
    "functions": lambda x, y: jnp.sum(jnp.log(y) + jnp.sin(x) * jnp.cos(y) + jnp.tanh(x) + jnp.exp(x)),
    "roots": lambda x, y: jnp.sum(jnp.sqrt(y) + jax.lax.rsqrt(y) + jax.nn.sigmoid(x)),
    "products": lambda x, y: jnp.sum((x @ y.T) @ (y @ x.T)) + (x @ y[0]) @ (y @ x[1]),
    "scalars": lambda x, y: jnp.sum(jnp.sum(x) * y) + jnp.sum(y / jnp.sum(y)),
    "moving": lambda x, y: jnp.sum(x.reshape(4, 1) * y.reshape(1, 4)) + jnp.squeeze(x[:1, :1]) ** 2,
    "shapes": lambda x, y: jnp.sum(jnp.sum(x, axis=0)[None, :] * y) + jnp.sum(x.T @ y),
    "powers": lambda x, y: jnp.sum(jnp.square(x) * y + jax.lax.integer_pow(x, 4) / y),
    "three axes": lambda x, y: jnp.sum(x.reshape(1, 2, 2).transpose(2, 0, 1) * y.reshape(2, 1, 2)),
    "precision": lambda x, y: jnp.sum((x * y.astype(jnp.float32)).astype(jnp.float64)),
    "several results": lambda x, y: sum(jnp.sum(part * k) for k, part in enumerate(jnp.split(x * y, 2))),
    "control flow": lambda x, y: jax.lax.scan(lambda c, r: (c + jnp.sum(r * y), None), 0.0, x)[0],
    "cross-entropy of rows": lambda x, y: jnp.sum(
        fp.layers.softmax_cross_entropy(x, jax.nn.softmax(y))
        + fp.layers.softmax_cross_entropy(y, jnp.array([0, 1]))
    ),
    "activations": lambda x, y: jnp.sum(
        fp.layers.relu(x) + fp.layers.silu(y) + fp.layers.softplus(x) + fp.layers.sigmoid(y)
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PRIMITIVES)
def test_equations_of_primitives_hold(case):
    x, y = jnp.array([[0.3, -1.2], [0.7, 2.0]]), jnp.array([[1.5, 0.4], [2.2, 0.9]])
    tolerance = 1e-6 if case == "precision" else None
    fp.derive(PRIMITIVES[case], argnums=(0, 1))(x, y).verify(tolerance)


def test_products_of_matrices_and_vectors_have_equations():
    matrix, vector = jnp.eye(2), jnp.ones(2)
    for a, b in [(matrix, matrix), (matrix, vector), (vector, matrix), (vector, vector)]:
        derivation = fp.derive(lambda a, b: jnp.sum(fp.name(a @ b, "y")), (0, 1))(a, b)
        # Of two vectors it is a number.
        assert texts(derivation.forward)[0] == ("y = aᵀ b" if a.ndim == b.ndim == 1 else "y = a b")
        assert [line.count(" = ") for line in texts(derivation.backward)[-2:]] == [
            2,
            2,
        ]  # by prod, and written out


def test_a_conversion_says_the_type_and_takes_real_parts_of_complex_numbers_alone():
    derivation = fp.derive(lambda x: jnp.sum(x.astype(jnp.float32)), detail="operators")(jnp.ones(2))
    assert "float32(x)" in derivation.text()
    assert "real" not in derivation.text()
    derivation = fp.derive(lambda x: jnp.real(jnp.vdot(x.astype(complex), jnp.ones(2))), detail="operators")(
        jnp.ones(2)
    )
    assert "float64(real(∂J" in derivation.text()


def test_a_result_that_is_not_computed_is_named():
    constant = jnp.array(2.0)
    for fun, forward, slope in [
        (lambda x: 1.0, "J = 1", "0"),
        (lambda x: constant, "J = constant", "0"),
        (lambda x: x, "J = x", "1"),
        (jax.jit(lambda x: x), "J = x", "1"),
        (lambda x: jax.lax.stop_gradient(x), "J = stop_gradient(x)", "0"),
    ]:
        derivation = fp.derive(fun)(3.0)
        assert texts(derivation.forward) == [forward]
        assert texts(derivation.backward) == [f"∂J/∂x = {slope}"]
        assert derivation.verify().errors == {"J": 0.0, "∂J/∂x": 0.0}
        assert derivation.latex().count("&=") == 2
        p = fp.backprop(fun)(3.0)
        assert (p.gradient, p.gradients["x"], list(p.gradients)) == (float(slope), float(slope), ["x"])
    assert texts(fp.derive(lambda J: J)(3.0).forward) == ["J_1 = J"]


def test_what_the_result_does_not_depend_on_has_gradient_zero():
    def loss(params, x):
        return fp.name(jnp.sum(params["used"] * x), "J")

    args = {"unused": jnp.ones((2, 3)), "used": jnp.ones(2)}, jnp.ones(2)
    derivation = fp.derive(loss)(*args)
    assert texts(derivation.backward)[-1] == "∂J/∂unused = 0"
    assert derivation.backward[-1].shape == (2, 3)
    derivation.verify()
    gradients = fp.backprop(loss)(*args).gradients
    assert list(gradients) == ["mul", "used", "unused"]
    assert not np.any(gradients["unused"])


def test_a_penalty_on_nothing():
    derivation = fp.derive(lambda λ: fp.name(fp.layers.l2_penalty(λ, {}), "s"), detail="operators")(0.5)
    assert texts(derivation.forward) == ["s = 0 λ"]
    assert texts(derivation.backward) == ["∂s/∂λ = 0"]
    derivation.verify()
    # Beside another term its cotangent is a symbol.
    derivation = fp.derive(lambda λ: fp.layers.l2_penalty(λ, []) * λ, detail="operators")(0.5)
    assert derivation.backward[-1].text().endswith("= 0 ∂J/∂l2_penalty + l2_penalty")
    derivation.verify()


COMPLEX = {
    "products": lambda z: jnp.real(jnp.sum((z @ z.T) ** 2) + jnp.sum(z * jnp.sin(z) / (z + 2j))),
    "a sum used twice": lambda z: jnp.real(jnp.sum(z * jnp.sum(z))),
    "products with real factors": lambda z: jnp.sum(jnp.abs(jnp.imag(z) @ (z @ jnp.real(z)))),
    "real parts": lambda z: jnp.sum(jnp.real(z) * jnp.abs(jnp.fft.fft(jnp.exp(1j * jnp.imag(z))))),
    "scan": lambda z: jnp.real(jax.lax.scan(lambda c, r: (c * jnp.tanh(r @ r), None), 1 + 0j, z)[0]),
}  # fmt: skip


@pytest.mark.parametrize("case", COMPLEX)
def test_complex_intermediates(case):
    z = jnp.array([[0.3 - 0.2j, 1.2j], [0.7 + 0j, 2.0 + 0.1j]])
    derivation = fp.derive(COMPLEX[case])(z)
    assert max(derivation.verify().errors.values()) < 1e-13


@pytest.mark.parametrize(
    "argnums", [np.int64(1), np.array(1), (np.int64(1),), [np.int32(-1)], np.array([0, 1])]
)
def test_argnums_of_any_integer_type(argnums):
    def loss(x, y):
        return jnp.sum(x * y**2)

    x, y = jnp.arange(3.0), jnp.ones(3)
    expected = jax.grad(loss, argnums)(x, y)
    p = fp.backprop(loss, argnums)(x, y)
    jax.tree.map(np.testing.assert_array_equal, p.gradient, expected)
    assert jax.tree.structure(p.gradient) == jax.tree.structure(expected)
    plain = np.asarray(argnums).tolist()
    assert texts(fp.derive(loss, argnums)(x, y).backward) == texts(fp.derive(loss, plain)(x, y).backward)


def test_shapes_are_enough_to_derive_but_not_to_verify():
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a)), chapter())
    derivation = fp.derive(fp.models.chapter)(*shapes)
    assert texts(derivation.backward) == BACKWARD
    with pytest.raises(TypeError, match=r"derive was given shapes .* give it arrays"):
        derivation.verify()


def test_a_mask_that_is_spread_has_no_cotangent():
    def masked(w, allowed):
        spread = jnp.broadcast_to(allowed, (3, 2))
        return fp.name(jnp.sum(jnp.where(spread, w, 0.0)), "J")

    derivation = fp.derive(masked)(jnp.ones((3, 2)), jnp.array([True, False]))
    assert not any("allowed" in line.left for line in derivation.backward)
    derivation.verify()
