"""Losses and models that a student writes, as a teacher writes them; each line is verified by autodiff."""

import jax
import jax.numpy as jnp
import optax
import pytest
from equation_lines import texts

import funcprop as fp

KEY = jax.random.key(0)


def normal(i, *shape):
    return jax.random.normal(jax.random.key(i), shape)


W, X, TARGETS, LABELS = normal(0, 5, 4), normal(1, 7, 5), normal(2, 7, 4), jnp.arange(7) % 4


def lines_of(loss, *arguments):
    derivation = fp.derive(loss)(*arguments)
    assert max(map(len, derivation.text().splitlines())) <= 100
    derivation.verify()
    return [*texts(derivation.forward), *texts(derivation.backward)]


def test_data_without_gradients_is_written_like_the_rest():
    def loss(w, x, t):
        target = jax.nn.softmax(t / 2)
        return -jnp.mean(jnp.sum(target * jax.nn.log_softmax(x @ w), -1))

    assert "J = −mean(softmax(r) · log softmax(z))" in lines_of(loss, W, X, TARGETS)

    def smoothed(w, x, y):
        t = optax.smooth_labels(jax.nn.one_hot(y, 4), 0.1)
        return optax.softmax_cross_entropy(x @ w, t).mean()

    assert "J = mean(−(u · log softmax(z)))" in lines_of(smoothed, W, X, LABELS)


def test_what_a_stop_gradient_hides_has_no_line():
    def loss(w, u, x):
        v = w.T @ u
        v = jax.lax.stop_gradient(v / jnp.linalg.norm(v))
        return jnp.mean((x @ w.T / (u @ w @ v)) ** 2)

    lines = lines_of(loss, normal(3, 4, 5), normal(4, 4), X)
    assert "z₃ = u w" in lines
    assert any("stop_gradient(n)" in line for line in lines)
    assert not any(line.startswith("∂J/∂z₁ ") or line.endswith("= 0") for line in lines)


def test_a_value_that_is_read_inside_of_a_loss_and_outside_is_a_line():
    """Its gradient has both contributions."""

    def loss(w, x, y):
        logp = jax.nn.log_softmax(x @ w)
        return jnp.mean(-0.9 * jnp.take_along_axis(logp, y[:, None], 1)[:, 0] - 0.1 * logp.mean(-1))

    lines = lines_of(loss, W, X, LABELS)
    assert "u = −9/10 ℓ[arange(7), y]" in lines
    assert "∂J/∂ℓ = prod(∂J/∂u, ∂u/∂ℓ) − 1/280 = scatter(−9/10 ∂J/∂u, [arange(7), y]) − 1/280" in lines


@pytest.mark.parametrize(
    ("of_key", "line"),
    [
        (lambda key: jax.random.normal(jax.random.split(key)[1], (7,)), "ε = normal(key)"),
        (lambda key: jax.random.gumbel(key, (7,)), "ε = gumbel(key)"),
        (lambda key: jnp.sqrt(jnp.arange(1.0, 51.0))[jax.random.randint(key, (7,), 0, 50)],
         "i = randint(key, 0, 50)"),
    ],
)  # fmt: skip
def test_draws_are_recognised_by_what_they_are(of_key, line):
    assert line in lines_of(lambda w, x, key: jnp.sum((x @ w) * of_key(key)), normal(0, 5), X, KEY)


def test_vectors_are_multiplied_and_measured_as_on_paper():
    lines = lines_of(lambda w, x: 0.01 * w @ w + jnp.sum(x @ w), normal(0, 5), X)
    assert "z₁ = 1/100 wᵀ w" in lines
    lines = lines_of(lambda w, x: optax.cosine_distance(x @ w, TARGETS).mean(), W, X)
    assert any(line.endswith("= z / ‖z, axis 1‖") for line in lines)
    lines = lines_of(lambda z: jnp.sum(jnp.linalg.norm(z, axis=0)), TARGETS)
    assert lines == ["J = sum(‖z, axis 0‖)", "∂J/∂z = z / ‖z, axis 0‖"]


def test_the_transpose_of_an_inverse_and_the_axis_of_a_maximum_are_told():
    def distance(m, x):
        inverse = jnp.linalg.inv(x.T @ x + jnp.eye(5))
        return jnp.mean(jnp.einsum("ni,ij,nj->n", x - m, inverse, x - m))

    lines = lines_of(distance, normal(0, 5), X)
    assert any(" + I)⁻ᵀ" in line for line in lines), lines
    lines = lines_of(lambda w, x: jnp.sum(jnp.max(jnp.sin(x @ w), 1)), W, X)
    assert any("max(sin(z), axis 1)" in line for line in lines), lines


def test_kinks_have_steps_and_ties_are_true():
    lines = lines_of(lambda z: jnp.sum(jnp.maximum(z, 0.5)), jnp.array([0.5, 1.0, -1.0]))
    assert lines[-1] == "∂J/∂z = step(z − 1/2)"


def test_the_slope_of_tanh_inside_of_a_loss_is_one_factor():
    """`jax.grad` writes it as `g (1 − h) + g (1 − h) h`."""

    def model(w, x):
        return jnp.tanh(x @ w["a"]) @ w["b"]

    def inner(w, x, y):
        return jnp.mean((model(w, x) - y) ** 2)

    def loss(w, x, y):
        g = jax.grad(inner)(w, x, y)
        return inner(jax.tree.map(lambda a, b: a - 0.1 * b, w, g), x, y)

    lines = lines_of(loss, {"a": normal(0, 5, 3), "b": normal(1, 3)}, X, normal(2, 7))
    assert any("⊙ (1 − h₁²)" in line for line in lines)
    assert any(line.endswith("a − 1/10 xᵀ h₂") for line in lines)


def test_matrices_are_solved_with_and_factored():
    def ridge(w, x, y):
        z = jnp.tanh(x @ w)
        return jnp.mean((z @ jnp.linalg.solve(z.T @ z + 0.1 * jnp.eye(4), z.T @ y)) ** 2)

    lines = lines_of(ridge, W, X, normal(3, 7))
    assert "u₁ = z₂ + 1/10 I" in lines
    assert "u₂ = u₁⁻¹ z₃" in lines
    assert any(line.endswith("= −(u₁⁻ᵀ ∂J/∂u₂) u₂ᵀ") for line in lines)
    lines = lines_of(lambda a: jnp.linalg.norm(a, "nuc"), W)
    assert lines[-1] == "∂J/∂a = prod(∂J/∂u, ∂u/∂a) = U(a) diag(∂J/∂u) V(a)ᵀ"
    spd = lambda a: a @ a.T + 3 * jnp.eye(5)  # noqa: E731
    assert any("log |det " in line for line in lines_of(lambda a: jnp.linalg.slogdet(spd(a))[1], W))
    assert "u₂ = u₁⁻¹" in lines_of(lambda a: jnp.sum(jnp.linalg.inv(spd(a)) ** 2), W)
    chol = lambda a: jnp.sum(jnp.log(jnp.diag(jnp.linalg.cholesky(spd(a)))))  # noqa: E731
    assert any("tril½" in line for line in lines_of(chol, W))
    top = lines_of(lambda a: jnp.linalg.eigvalsh(spd(a))[-1], W)
    assert any(") diag(∂J/∂" in line and line.count("Q(") == 2 for line in top), top


def test_a_function_of_the_user_is_not_taken_for_one_of_jax_by_its_name():
    @jax.custom_jvp
    def logaddexp(a, b):
        return 2 * a + b

    logaddexp.defjvps(lambda t, ans, a, b: 2 * t, lambda t, ans, a, b: t)
    lines = lines_of(lambda z: jnp.sum(logaddexp(z[0], z[1])), TARGETS)
    assert not any("σ(" in line for line in lines)
    assert any("σ(" in line for line in lines_of(lambda z: jnp.sum(jnp.logaddexp(z[0], z[1])), TARGETS))
    assert any("⁻ᵀ" in line for line in lines_of(lambda a: jnp.linalg.det(a @ a.T + jnp.eye(5)), W))


def test_single_entries_are_put_and_taken_by_their_places():
    def loss(w, x, y):
        s = x @ w
        margins = jnp.maximum(0.0, s - jnp.take_along_axis(s, y[:, None], 1) + 1)
        return margins.at[jnp.arange(7), y].set(0.0).sum()

    lines = lines_of(loss, W, X, LABELS)
    assert "u₂ = h with [arange(7), y] = 0" in lines
    assert any(line.endswith("∂J/∂u₂ with [arange(7), y] = 0") for line in lines)
    assert any("step(r)" in line for line in lines)


def test_the_axes_of_a_norm_and_of_a_comparison_are_told():
    def batch_norm(w, x):
        z = x @ w
        return jnp.sum(jnp.tanh((z - z.mean(0)) / jnp.sqrt(z.var(0) + 1e-5)))

    assert "n = norm(z, axis 0)" in lines_of(batch_norm, W, X)

    def layer_norm(p, x):
        n = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return jnp.sum(jnp.tanh(n * p["scale"] + p["bias"]))

    lines = lines_of(lambda x, p: layer_norm(p, x), TARGETS, {"scale": jnp.ones(4), "bias": jnp.ones(4)})
    assert "n = norm(x) ⊙ scale + bias" in lines
    assert any("⊙ mean(∂J/∂n ⊙ scale ⊙ norm(x))) / σ(x)" in line for line in lines), lines

    def ranking(w, x, y):
        s = x @ w
        pairs = (y[:, None] > y[None]).astype(s.dtype)
        return jnp.sum(pairs * jax.nn.softplus(s[None] - s[:, None]))

    lines = lines_of(ranking, normal(0, 5), X, normal(1, 7))
    assert any("[y[:, None] > y[None]]" in line for line in lines)
