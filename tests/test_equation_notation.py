"""How numbers, names and sums are written in equations, as text and LaTeX."""

from __future__ import annotations

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equation_lines import BACKWARD, FORWARD, chapter, own, texts

import funcprop as fp
from funcprop.reporting.mathml import mathml
from funcprop.rules.notation import latex_name, number_text

KEY = jax.random.key(0)


def test_infinity_and_small_numbers_are_written_as_in_books():
    def loss(x):
        return jnp.sum(jax.nn.softmax(jnp.where(x > 0, x, -jnp.inf)) * 1e-7)

    derivation = fp.derive(loss)(jnp.array([1.0, -1.0, 2.0]))
    assert "−∞" in derivation.text()
    assert "\\infty" in derivation.latex()
    assert " 10^{-7}" in derivation.latex()
    assert "inf" not in derivation.latex().replace("\\infty", "")


def test_latex_balances_and_has_no_character_that_tex_does_not_know():
    net = nn.Sequential([nn.Dense(5), own, nn.Dense(3)])
    x = jnp.array([0.3, -1.0, 0.7, 2.0])
    latex = fp.derive(lambda p, x: jnp.sum(net.apply(p, x) ** 2))(net.init(KEY, x), x).latex()
    assert latex.count("{") == latex.count("}")
    assert latex.count("\\left") == latex.count("\\right")
    assert not re.search(r"[^\x00-\x7f]", latex)
    assert "where $" in latex


@pytest.mark.parametrize(("axis", "text"), [(0, "axis 0"), ((0, 2), "axes 0, 2"), (None, "")])
def test_sums_and_means_name_their_axes_in_every_notation(axis, text):
    x = jnp.arange(24.0).reshape(2, 3, 4)
    for name, reduce in (("sum", jnp.sum), ("mean", jnp.mean)):
        derivation = fp.derive(lambda w, reduce=reduce: jnp.sum(reduce(jnp.tanh(w), axis) ** 2))(x)
        assert f"{name}(tanh(w){', ' if text else ''}{text})" in derivation.text()
        assert (f"_{{\\text{{{text}}}}}" in derivation.latex()) == bool(text)
        derivation.verify()


def test_a_long_sum_is_broken_into_rows():
    def loss(w, xs):
        h = [fp.name(jnp.tanh(x @ w), f"hidden_state_{i}") for i, x in enumerate(xs)]
        return sum(jnp.sum(v**2) for v in h)

    derivation = fp.derive(loss)(jnp.ones((2, 2)), [jnp.ones((3, 2)) * i for i in range(6)])
    assert max(map(len, derivation.text().splitlines())) <= 100
    assert max(map(len, derivation.text(width=70).splitlines())) <= 70
    derivation.verify()


def test_numbers_and_small_functions_are_written_as_in_books():
    def loss(z, y):
        d = jnp.abs(z - y)
        nll = 0.5 * jnp.exp(-2 * z) + jnp.log(z * z) + 0.5 * jnp.log(2 * jnp.pi)
        return jnp.sum(jnp.where(d > 1, d / np.sqrt(8), 0)) + jnp.sum(nll)

    found = fp.derive(loss)(jnp.array([0.5, -2.0, 1.5]), jnp.ones(3))
    text = found.text()
    assert "sum(φ(z − y))" in text
    assert "φ(z) = where(|z| > 1, |z| / √8, 0)" in text
    assert "1/2 log 2π" in text
    assert "exp′" not in text
    assert "\\sqrt{8}" in found.latex()
    assert all(mathml(form.latex(), form.text()) for line in found.forward for form in line.forms)
    assert max(found.verify().errors.values()) < 1e-10


def test_roots_fractions_and_logarithms_are_written_with_their_signs():
    def loss(z, y):
        u = jnp.sum(y) ** 2
        return jnp.mean(jnp.sqrt((z - y) ** 2 + 1e-6)) + jnp.sum(z**2) / u + jnp.sum(jnp.log1p(z**4)) / 3

    found = fp.derive(loss)(jnp.array([0.5, -2.0]), jnp.ones(2))
    text = found.text()
    assert "h = (z − y)² + 10⁻⁶" in text
    assert "= 1 / (4 √h)" in text
    assert "mean(√h)" in text
    assert "log(1 + z⁴)" in text
    assert "2 z / " in text
    assert max(found.verify().errors.values()) < 1e-10


def test_axes_that_are_new_in_both_operands_are_told():
    """Without them a table of distances would read as the difference of a vector and itself."""
    found = fp.derive(lambda x, y: jnp.sum(jnp.exp(-jnp.sum((x[:, None] - y[None]) ** 2, -1))))(
        jnp.eye(3, 2), jnp.ones((4, 2))
    )
    assert "(x[:, None] − y[None])²" in found.text()
    assert max(found.verify().errors.values()) < 1e-10


def test_new_axes_are_told_where_a_reader_would_take_others():
    """Of a square matrix: below its columns stands what is repeated along its rows."""
    rows, columns = (lambda x, y: jnp.sum((x - y) ** 2)), lambda x, y: jnp.sum((x - y[:, None]) ** 2)
    assert "None" not in fp.derive(rows)(jnp.eye(3), jnp.ones(3)).text()
    assert "(x − y[:, None])²" in fp.derive(columns)(jnp.eye(3), jnp.ones(3)).text()
    assert "None" not in fp.derive(columns)(jnp.eye(3, 2), jnp.ones(3)).text()


def test_remainders_of_integers_and_entries_in_reverse():
    """XLA's remainder has the sign of the dividend, so that five operators are written for Python's."""

    def loss(w, n, m):
        return jnp.sum(jnp.tanh(w[(6 - n) % 4] * w[n % m])[:, ::-1] * jnp.arange(1.0, 4.0) / 0.8)

    found = fp.derive(loss)(jnp.linspace(-1, 1, 12).reshape(4, 3), jnp.array([1, 9]), jnp.array([3, 4]))
    for written in ("w[mod(6 − n, 4)]", "w[mod(n, m)]", "[:, ::-1]"):
        assert written in found.text()
    assert "re" not in found.text()  # neither rem nor rev
    assert max(found.verify().errors.values()) < 1e-10


@pytest.mark.parametrize("shape", [(1, 3), (2, 1, 3)])
def test_a_norm_of_one_row_has_cotangents_of_its_parameters(shape):
    """Axes of size 1 are added up like the others: the cotangent of γ had the shape of the row."""

    def loss(g, b, x):
        centred = x - x.mean(-1, keepdims=True)
        return jnp.sum(jnp.tanh(centred / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5) * g + b))

    x = jnp.linspace(0, 1, 3 * shape[0]).reshape(shape) ** 2
    found = fp.derive(loss, (0, 1, 2))(jnp.arange(1.0, 4.0), jnp.zeros(3), x)
    assert "norm(x) ⊙ g + b" in found.text()
    assert max(found.verify().errors.values()) < 1e-10


def test_a_mean_over_no_axis_is_not_written():
    """As in a loss of one example that takes the mean of one number."""
    of_one = lambda w, x: jnp.mean(jnp.tanh(w @ x))  # noqa: E731
    found = fp.derive(lambda w, x: jax.vmap(of_one, (None, 0))(w, x).sum())(jnp.ones(3), jnp.ones((2, 3)))
    assert "J = sum(tanh(" in found.text()
    assert max(found.verify().errors.values()) < 1e-10


def test_places_along_several_axes():
    """With all that stands along the other axes; places along axes that are apart are read by a function."""

    def loss(x, i, j):
        return jnp.sum(x[i, j] ** 2) + jnp.sum(x[:, i, j] ** 3)

    found = fp.derive(loss)(
        jnp.linspace(-1, 1, 24).reshape(2, 3, 4), jnp.array([0, 1, 1]), jnp.array([2, 1, 0])
    )
    for written in ("x[i, j]", "x[:, i, j]", "[i, j])", "[:, i, j])"):
        assert written in found.text()
    assert max(found.verify().errors.values()) < 1e-10
    apart = fp.derive(lambda x, i: jnp.sum(x[i, :, i]))(jnp.ones((2, 3, 4)), jnp.array([0, 1]))
    assert "gather(x, concat(i, i))" in apart.text()
    assert max(apart.verify().errors.values()) < 1e-10


def test_new_axes_are_known_through_functions_of_each_entry():
    def of_pairs(v):
        return jnp.sum(jnp.where((v[:, None] > 0) & (v[None] > 0), (v[:, None] > v) * v[:, None] * v, 0.0))

    found = fp.derive(of_pairs)(jnp.array([1.0, -2.0, 3.0]))
    assert "(v > 0)[:, None] and (v > 0)[None]" in found.text()
    assert "[v[:, None] > v[None]] ⊙ v[:, None] ⊙ v" in found.text()
    assert max(found.verify().errors.values()) < 1e-10


def test_solves_with_triangular_matrices_and_rows_that_are_added_up():
    def loss(a, b, i):
        low = jnp.tril(a) + 2 * jnp.eye(3)
        y = jax.scipy.linalg.solve_triangular(low, jax.ops.segment_sum(b, i, 3), lower=True)
        return jnp.sum(jax.scipy.linalg.solve_triangular(low, y, lower=True, trans=1) ** 2)

    arguments = jnp.arange(9.0).reshape(3, 3) / 10, jnp.arange(8.0).reshape(4, 2), jnp.array([0, 2, 2, 1])
    found = fp.derive(loss, (0, 1))(*arguments)
    text = found.text()
    assert "sum(b by i)" in text
    assert "⁻¹ " in text
    assert "tril(" in text
    assert "triangular_solve" not in text
    assert max(found.verify().errors.values()) < 1e-10


def test_what_is_written_twice_is_computed_once():
    def loss(w, x, y):
        far = jnp.abs(x @ w - y) > 1
        return jnp.mean(jnp.where(far, jnp.abs(x @ w - y) - 0.5, 0.5 * (x @ w - y) ** 2))

    found = fp.derive(loss)(jnp.ones(2), jnp.eye(2), jnp.array([0.3, 5.0]))
    assert texts(found.forward) == ["z = x w", "J = mean(huber(z − y))"]
    assert max(found.verify().errors.values()) < 1e-10


def test_a_product_with_a_constant_is_no_multiple():
    """The ones of a second derivative times a matrix, times a number."""
    found = fp.derive(lambda w: jnp.sum(jnp.sin(3.0 * (jnp.ones(1) @ w))))(jnp.ones((1, 4)))
    assert "3 1 w" in found.text()
    assert max(found.verify().errors.values()) < 1e-10


def test_latex_is_balanced_and_complete():
    latex = fp.derive(fp.models.chapter)(*chapter(bias=True)).latex()
    assert latex.count("\\begin{align*}") == latex.count("\\end{align*}") == 2
    assert latex.count("{") == latex.count("}")
    assert latex.count("\\left(") == latex.count("\\right)")
    assert len(re.findall("&=", latex)) == len(FORWARD) + len(BACKWARD) + 1
    assert (
        r"\frac{\partial J}{\partial z} &= \mathrm{prod}\!\left(\frac{\partial J}{\partial h}, "
        r"\frac{\partial h}{\partial z}\right) = \frac{\partial J}{\partial h} \odot \phi'\!\left(z\right)"
    ) in latex
    assert not re.search(r"[^\x00-\x7f]", latex)


def test_quotients_inside_products_are_in_parentheses():
    def loss(x, y):
        return fp.name(jnp.sum(fp.name(y * (1 / x), "a") * fp.name(y / x, "b")), "J")

    lines = texts(fp.derive(loss)(jnp.ones(2), jnp.ones(2)).backward)
    assert "− ∂J/∂b ⊙ y / x²" in lines[-1]
    assert "(1 / x)" not in lines[-1]
    other = fp.derive(lambda x, y: jnp.sum(x / (x * jnp.exp(y))))(jnp.ones(2), jnp.ones(2)).forward[-1].text()
    assert other == "J = sum(x / (x ⊙ exp(y)))"


def test_a_function_with_a_derivative_of_its_own_is_written_by_its_name():
    derived = fp.derive(lambda w: jnp.sum(fp.name(jax.nn.relu(w), "h")))(jnp.array([1.0, -2.0]))
    assert derived.forward[0].text() == "h = relu(w)"
    assert derived.verify()


def test_latex_of_names_with_characters_that_mean_something_to_latex():
    assert latex_name("a_b{c}\\d^e~f") == "\\mathrm{a\\_b\\{c\\}\\backslash d\\wedge e\\sim f}"


def test_a_sum_of_a_sum_has_parentheses_in_latex():
    latex = fp.derive(lambda x, y: jnp.sum(x - y**2))(jnp.ones(2), jnp.ones(2)).latex()
    assert r"J &= \sum \left(x - y^{2}\right)" in latex


def _of_tanh(w, b):
    h = jnp.tanh(w @ b)
    return jnp.sum(b @ h) - jnp.sum(h * h)


def _matrices(w, b, x, keys):
    """Functions of whose equations each was read as something else, with a line that says what they are."""
    n = len(w)
    positive = w @ w.T + jnp.eye(n)
    batch = positive * jnp.array([1.0, 2.0])[:, None, None]
    return {
        "λ times": (lambda w, b: b[0] / 2 * jnp.sum(w**2), "b[0] w"),
        "trace": (lambda w, b: jnp.trace(w @ positive), "tr("),
        "diagonal": (lambda w, b: jnp.sum((w + jnp.diag(b)) ** 2), "diag("),
        "solves": (lambda w, b: jnp.sum(jnp.linalg.solve(batch + w, x) ** 2), "⁻¹ x"),
        "keys": (
            lambda w, b: jnp.sum((w + jax.vmap(lambda k: jax.random.normal(k, (n,)))(keys)) ** 2),
            "= normal(keys)",
        ),
        "complement": (lambda w, b: jnp.sum(w @ jnp.log1p(-b)), "log(1 − b)"),
        "equal terms": (_of_tanh, "− 2 h"),
    }


@pytest.mark.parametrize(
    "name", ["λ times", "trace", "diagonal", "solves", "keys", "complement", "equal terms"]
)
def test_what_textbooks_have_a_symbol_for(name):
    w, b, x = (
        jnp.array(np.random.default_rng(0).normal(size=(3, 3))),
        jnp.array([0.3, -0.2, 0.7]),
        jnp.ones(3),
    )
    keys = jax.random.split(KEY, 3)
    x = jnp.ones((2, 3, 1))

    def of(w, b, x, keys):
        return _matrices(w, b, x, keys)[name][0](w, b)

    derivation = fp.derive(of)(w, b, x, keys)
    derivation.verify()
    assert _matrices(w, b, x, keys)[name][1] in derivation.text()


def test_a_root_of_a_large_integer_is_no_name_of_a_number():
    """One in a few numbers is such a root by chance, in single precision."""
    for value in (5.952029e-4, 8.373080e-4, 1680.2391):
        assert "√" not in number_text(value, np.dtype("float32"))[0]
    assert number_text(float(np.float32(48**-0.5)), np.dtype("float32"))[0] == "1/√48"


def test_a_formula_that_is_wider_than_the_page_is_broken():
    def wide(z):
        t = z / (1 + z)
        return 1 + t + t**2 * (1 + t + t**2 * (1 + t + t**2 * (1 + t + t**2)))

    text = fp.derive(lambda x: jnp.sum(wide(x) * 0.37))(jnp.ones(4)).text()
    assert "φ(z) = " in text
    assert max(map(len, text.splitlines())) <= 100
