"""Per-example quantities against dense Jacobians, which know nothing of taps."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from curvature_models import EXAMPLES, LOSSES, MODELS

import funcprop as fp
from funcprop.curvature.example_gradients import loss_roots as roots

QUANTITIES = [
    "value", "gradient", "gradients", "norm", "second_moment", "variance", "snr", "gram", "ntk", "diag_ggn",
    "trace_ggn",
]  # fmt: skip


def close(actual, expected, case):
    """To 1e-10 of the largest entry, with a floor for true zeros."""
    a, e = np.asarray(actual), np.asarray(expected)
    assert a.shape == e.shape, (case, a.shape, e.shape)
    np.testing.assert_allclose(
        a, e, rtol=0, atol=1e-10 * max(np.abs(e).max(initial=0), 1e-4), err_msg=str(case)
    )


class Oracle:
    """Gradients and Gauss-Newton columns of every example, from the Jacobian of the outputs."""

    def __init__(self, jacobian, outputs, loss, y):
        self.leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(jacobian)]
        of_output = jax.jit(jax.vmap(jax.value_and_grad(loss)))(outputs, y)
        values, g = map(np.asarray, of_output)
        h = np.asarray(jax.jit(jax.vmap(jax.hessian(loss)))(outputs, y))
        self.value = values.mean()
        self.gradients = [np.einsum("nc,nc...->n...", g, j) for j in self.leaves]
        self.diagonals = [np.einsum("nc...,ncd,nd...->n...", j, h, j).mean(0) for j in self.leaves]

    def __call__(self, name):
        each = self.gradients
        flat = np.concatenate([w.reshape(len(w), -1) for w in each], 1)
        return {
            "value": lambda: [self.value],
            "gradient": lambda: [w.mean(0) for w in each],
            "gradients": lambda: each,
            "norm": lambda: [np.linalg.norm(w.reshape(len(w), -1), axis=1) for w in each],
            "second_moment": lambda: [(w**2).mean(0) for w in each],
            "variance": lambda: [w.var(0) for w in each],
            "gram": lambda: [flat @ flat.T],
            "ntk": lambda: [
                sum(
                    np.einsum("ncp,mdp->ncmd", j, j)
                    for j in (v.reshape(*v.shape[:2], -1) for v in self.leaves)
                )
            ],
            "diag_ggn": lambda: self.diagonals,
            "trace_ggn": lambda: [d.sum() for d in self.diagonals],
        }[name]()


@functools.cache
def jacobian(name):
    model = MODELS[name]()
    return jax.jit(
        jax.vmap(
            lambda x: (jax.jacrev(lambda p: model.apply(p, x))(model.params), model.apply(model.params, x))
        )
    )(model.x)


def oracle(name, loss):
    model = MODELS[name]()
    return Oracle(*jacobian(name), LOSSES[loss].of_one, LOSSES[loss].targets(EXAMPLES, model.outputs))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("loss", list(LOSSES))
def test_exact(name, loss):
    model = MODELS[name]()
    y = LOSSES[loss].targets(EXAMPLES, model.outputs)
    names = QUANTITIES if loss == "softmax cross-entropy" else ["norm", "diag_ggn"]
    found = fp.per_example(model.apply, LOSSES[loss].of_one)(model.params, model.x, y, names)
    expected = oracle(name, loss)
    for quantity in set(names) - {"snr"}:
        actual = jax.tree.leaves(found[quantity])
        for k, (a, e) in enumerate(zip(actual, expected(quantity), strict=True)):
            close(a, e, (name, loss, quantity, k))


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("name", "limit"), [("cnn", 10_000), ("tied", 800), ("stacked", 250)])
def test_in_parts(name, limit):
    """So few bytes that there are several parts, and a rest; nothing changes."""
    model, loss = MODELS[name](), LOSSES["softmax cross-entropy"]
    y = loss.targets(EXAMPLES, model.outputs)
    x, y = (jnp.concatenate([a, a[::-1], a[1:2]]) for a in (model.x, y))
    names = ["norm", "gradients", "variance", "diag_ggn", "trace_ggn", "kflr"]
    whole, parts = (
        fp.per_example(model.apply, loss.of_one, budget=budget)(model.params, x, y, names)
        for budget in (2**26, limit)
    )
    for a, e in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        close(a, e, name)


def test_snr_is_squared_mean_over_variance():
    found = fp.per_example(lambda w, x: jnp.vdot(w, x), lambda o, y: o * y)(
        jnp.ones(2), jnp.array([[1.0, 0.0], [3.0, 0.0]]), jnp.ones(2), ["snr", "variance", "gradient"]
    )
    np.testing.assert_allclose(found["gradient"], [2, 0])
    np.testing.assert_allclose(found["variance"], [1, 0])
    np.testing.assert_allclose(found["snr"], [4, 0])


def test_scaling_of_the_gauss_newton_diagonal():
    """½ (w x − y)² per example, mean over the batch: the diagonal is the mean of x²; twice without ½."""
    x = jnp.array([[1.0], [2.0], [3.0]])
    for factor in (0.5, 1.0):
        model = fp.per_example(lambda w, x: w @ x, lambda o, y, f=factor: f * (o - y) ** 2)
        found = model(jnp.ones(1), x, jnp.zeros(3), ["diag_ggn", "trace_ggn"])
        np.testing.assert_allclose(found["diag_ggn"], [2 * factor * 14 / 3])
        np.testing.assert_allclose(found["trace_ggn"], 2 * factor * 14 / 3)


@pytest.mark.parametrize("loss", ["softmax cross-entropy", "squared error"])
def test_sampled_diagonal_is_unbiased(loss):
    model, chosen = MODELS["mlp"](), LOSSES[loss]
    y = chosen.targets(EXAMPLES, model.outputs)
    quantities = fp.per_example(model.apply, chosen.of_one)
    samples = 1000
    keys = jax.random.split(jax.random.key(0), samples)
    found = jax.jit(
        jax.vmap(lambda key: quantities(model.params, model.x, y, ["diag_ggn_mc", "trace_ggn_mc"], key))
    )(keys)
    for name in ("diag_ggn", "trace_ggn"):
        for a, e in zip(jax.tree.leaves(found[name + "_mc"]), oracle("mlp", loss)(name), strict=True):
            error = np.asarray(a).std(0) / samples**0.5
            assert (np.abs(np.asarray(a).mean(0) - e) <= 5 * error + 1e-12).all()


def test_sampled_is_the_same_whatever_else_is_asked():
    model, loss = MODELS["mlp"](), LOSSES["softmax cross-entropy"]
    y = loss.targets(EXAMPLES, model.outputs)
    quantities = fp.per_example(model.apply, loss.of_one)
    key, names = jax.random.key(1), ["diag_ggn_mc", "kfac"]
    alone = quantities(model.params, model.x, y, names, key)
    for more in (["diag_ggn"], ["diag_ggn", "gradient"]):
        beside = quantities(model.params, model.x, y, [*names, *more], key)
        for name in names:
            for a, e in zip(jax.tree.leaves(beside[name]), jax.tree.leaves(alone[name]), strict=True):
                close(a, e, (name, more))


# --- which way each parameter goes ------------------------------------------------------------


def ways(name):
    model = MODELS[name]()
    return {
        r.path: r.ways for r in fp.per_example(model.apply, lambda o, y: o.sum()).audit(model.params, model.x)
    }


def test_audit_of_layers():
    cnn, lstm = ways("cnn"), ways("lstm")
    assert cnn["['grouped']['w']"] == ("outer product",)
    assert cnn["['grouped']['b']"] == ("sum",)
    assert lstm["['wh']"] == ("outer product",)
    assert ways("tied")["['embedding']"] == ("rows", "outer product")
    assert ways("attention")["['query']"] == ("outer product",)
    assert ways("attention")["['norm1']['scale']"] == ("contraction",)


def test_audit_says_what_kfac_keeps():
    """Expanded and reduced, of a leaf that is small, large, in a loop, a table, or used twice."""

    def model(p, x):
        tokens = jnp.array([0, 2, 1])
        shown = p["tied"][tokens] @ x[:40] + jnp.sum(p["table"][tokens], 1)
        shown = shown.sum() + p["tied"] @ x[:40]
        for _ in range(2):
            x = jnp.tanh(x @ p["twice"] + p["bias"])
        steps = jax.lax.scan(lambda h, _: (jnp.tanh(p["loop"] @ h), None), x, length=3)[0]
        layers = jax.lax.scan(lambda h, w: (w @ h, None), steps, p["layers"])[0]
        normed = p["large"] / jnp.linalg.norm(p["large"])
        return (normed @ layers).sum() + (p["small"]["w"] ** 2).sum() + shown.sum()

    shapes = {"tied": (30, 40), "table": (50, 2), "twice": (41, 41), "bias": (41,), "loop": (41, 41)}
    shapes |= {"layers": (2, 41, 41), "large": (41, 41), "small": {"w": (5,)}, "unused": (3,)}
    is_shape = lambda s: isinstance(s, tuple)  # noqa: E731
    params = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, float), shapes, is_leaf=is_shape)
    x = jax.ShapeDtypeStruct((4, 41), float)
    audit = fp.per_example(model, lambda o, y: o**2).audit(params, x)
    kept = {r.path: (r.expand, r.reduce) for r in audit}
    too_many = "are more than 1024"
    assert kept == {
        "['bias']": ("exact block",) * 2,
        "['large']": (f"diagonal: 1681 entries {too_many}, and it enters `mul`",) * 2,
        "['layers']": ("2 blocks A ⊗ G",) * 2,
        "['loop']": ("A ⊗ G, expand over 3 positions", "A ⊗ G, reduce over 3 positions"),
        "['small']['w']": ("exact block",) * 2,
        "['table']": tuple(
            f"A ⊗ G with a diagonal A, {way} over 3 positions" for way in ("expand", "reduce")
        ),
        "['tied']": (f"diagonal: 1200 entries {too_many}, and its use in `gather` is no outer product",) * 2,
        "['twice']": tuple(
            f"A ⊗ G, {way} over 2 positions of 2 uses together" for way in ("expand", "reduce")
        ),
        "['unused']": ("exact block",) * 2,
    }
    rows = [re.split("  +", line) for line in str(audit).splitlines()]
    assert rows[0] == ["parameter", "gradients", "through", "KFAC", "with sharing='reduce'"]
    (loop,) = [row for row in rows if row[0] == "['loop']"]
    assert loop[1:3] == ["outer product", "`dot_general`, used in a loop"]
    assert loop[3:] == list(kept["['loop']"])
    assert ["", "outer product", "`dot_general`"] in rows  # the other use of a leaf
    conv = fp.per_example(MODELS["cnn"]().apply, lambda o, y: o.sum())
    kept = {r.path: (r.expand, r.reduce) for r in conv.audit(MODELS["cnn"]().params, MODELS["cnn"]().x)}
    assert kept["['conv']['b']"] == (
        "G alone, expand over 36 positions",
        "exact block, summed over positions",
    )
    assert kept["['grouped']['w']"][0] == "2 blocks A ⊗ G, expand over 4 positions"


def test_weights_in_one_array():
    """A piece of a leaf is a view of it: its use in a product is an outer product."""

    def model(w, x):
        first, second = jnp.unstack(w)
        return jnp.tile(jnp.tanh(x @ first) @ second, 2)

    w = jax.random.normal(jax.random.key(0), (2, 3, 3))
    x, y = jnp.sin(jnp.arange(12.0)).reshape(4, 3), jnp.cos(jnp.arange(24.0)).reshape(4, 6)
    loss = lambda output, y: jnp.sum((output - y) ** 2)  # noqa: E731
    quantities = fp.per_example(model, loss)
    expected = jax.vmap(jax.grad(lambda w, x, y: loss(model(w, x), y)), (None, 0, 0))(w, x, y)
    close(quantities(w, x, y, ["gradients"])["gradients"], expected, "unstacked")
    assert [row.ways for row in quantities.audit(w, x)] == [("outer product", "outer product")]


def test_audit_takes_shapes():
    shape = jax.ShapeDtypeStruct
    audit = fp.per_example(lambda w, x: x @ w, jnp.subtract).audit(shape((3,), float), shape((4, 3), float))
    assert str(audit) == str(
        fp.per_example(lambda w, x: x @ w, jnp.subtract).audit(jnp.ones(3), jnp.ones((4, 3)))
    )


def test_no_outer_form():
    """Weight norm, a parameter through softmax, changed by a loop, in a branch: exact all the same."""

    def model(p, x):
        w = p["v"] / jnp.linalg.norm(p["v"], axis=0)
        carried, _ = jax.lax.scan(lambda c, t: (jnp.sin(c) * t, None), p["carried"], jnp.arange(1.0, 3.0))
        h = jnp.tanh(x @ w) * jax.nn.softmax(p["mix"]) + carried
        h = jax.lax.scan(lambda h, _: (h * jnp.exp(p["rate"]) + p["rate"], None), h, length=2)[0]
        return jax.lax.cond(x[0] > 0, lambda q: q * h, lambda q: h - q, p["branch"])

    rng = np.random.default_rng(0)
    shapes = {"v": (4, 3), "mix": (3,), "carried": (3,), "rate": (3,), "branch": (3,), "unused": (2,)}
    params = {k: jnp.asarray(rng.standard_normal(s)) for k, s in shapes.items()}
    x, y = jnp.asarray(rng.standard_normal((5, 4))), jnp.asarray(rng.standard_normal((5, 3)))
    loss = lambda o, y: jnp.sum((o - y) ** 2)  # noqa: E731
    quantities = fp.per_example(model, loss)
    found = quantities(params, x, y, ["gradients", "diag_ggn"])
    each = jax.jit(jax.vmap(lambda x, y: jax.grad(lambda p: loss(model(p, x), y))(params)))(x, y)
    jacobians = jax.jit(jax.vmap(lambda x: jax.jacrev(lambda p: model(p, x))(params)))(x)
    for path in shapes:
        close(found["gradients"][path], each[path], path)
        close(found["diag_ggn"][path], 2 * (jacobians[path] ** 2).sum(1).mean(0), path)
    routes = {route.path: route for route in quantities.audit(params, x)}
    assert routes["['rate']"].reasons[0] == "it enters `exp`, in a loop"
    assert routes["['carried']"].reasons == ("a loop carries it on, changed",)
    assert routes["['branch']"].reasons == ("it enters `cond`",)
    assert routes["['unused']"].ways == ()
    assert all(routes[f"['{path}']"].falls_back for path in ("v", "mix", "branch"))
    assert "['unused']" in str(quantities.audit(params, x))


def test_gradients_have_the_precision_of_the_parameters():
    """A model in bfloat16: a product, a sum, a table, a scale and a leaf without an outer form."""

    def model(p, x):
        p = jax.tree.map(lambda w: w.astype(jnp.bfloat16), p)
        h = jnp.tanh(p["table"][x] @ p["w"] + p["b"])
        return (p["scale"] * h * jnp.exp(p["rate"]))[0].astype(jnp.float32)

    rng = np.random.default_rng(0)
    shapes = {"table": (5, 4), "w": (4, 3), "b": (3,), "scale": (3,), "rate": (3,)}
    params = {k: jnp.asarray(rng.standard_normal(s), jnp.float32) for k, s in shapes.items()}
    x, y = jnp.arange(6)[:, None] % 5, jnp.arange(6) % 3
    found = fp.per_example(model, CROSS_ENTROPY)(params, x, y, ["gradients", "norm", "variance", "kflr"])
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype("float32")}
    of_one = lambda x, y: jax.grad(lambda p: CROSS_ENTROPY(model(p, x), y))(params)  # noqa: E731
    each = jax.jit(jax.vmap(of_one))(x, y)
    for path, w in each.items():
        np.testing.assert_allclose(found["gradients"][path], w, rtol=0, atol=0.01 * abs(w).max())
        own = np.asarray(found["gradients"][path], float).reshape(6, -1)
        np.testing.assert_allclose(found["norm"][path], np.linalg.norm(own, axis=1), rtol=1e-5)
        np.testing.assert_allclose(found["variance"][path].ravel(), own.var(0), rtol=1e-4, atol=1e-6)


def test_real_parameters_of_a_complex_model():
    """A state space with complex eigenvalues: the gradients are real, though the products are complex."""

    def model(p, x):
        eigenvalues = jnp.exp(-jnp.exp(p["decay"]) + 1j * p["frequency"])
        inputs = x.astype(complex) @ p["in"] + p["bias"]
        step = lambda h, u: (eigenvalues * h + u, None)  # noqa: E731
        state, _ = jax.lax.scan(step, jnp.zeros(3, complex), inputs)
        return jnp.abs(jnp.fft.fft(state)) @ p["out"]

    rng = np.random.default_rng(0)
    shapes = {"decay": (3,), "frequency": (3,), "in": (2, 3), "bias": (3,), "out": (3, 2)}
    params = {k: jnp.asarray(rng.standard_normal(s)) for k, s in shapes.items()}
    x, y = jnp.asarray(rng.standard_normal((4, 5, 2))), jnp.arange(4) % 2
    found = fp.per_example(model, CROSS_ENTROPY)(params, x, y, QUANTITIES)
    of_one = lambda x: (jax.jacrev(lambda p: model(p, x))(params), model(params, x))  # noqa: E731
    jacobians = jax.jit(jax.vmap(of_one))(x)
    expected = Oracle(*jacobians, CROSS_ENTROPY, y)
    for quantity in set(QUANTITIES) - {"snr"}:
        for k, (a, e) in enumerate(zip(jax.tree.leaves(found[quantity]), expected(quantity), strict=True)):
            assert a.dtype == float
            close(a, e, (quantity, k))


# --- roots ------------------------------------------------------------------------------------

CROSS_ENTROPY = optax.softmax_cross_entropy_with_integer_labels
LOG_SOFTMAX, LOG_SUM_EXP = jax.nn.log_softmax, jax.nn.logsumexp
PRIOR = jnp.array([0.5, 1.0, 2.0, 3.0])


def one_hot_loss(o, y):
    return -(jax.nn.one_hot(y, 4) * LOG_SOFTMAX(o)).sum()


ROOTS = {
    "labels": (CROSS_ENTROPY, (5,), jnp.array(2), roots.Labelled, 4),
    "two classes": (CROSS_ENTROPY, (2,), jnp.array(1), roots.Labelled, 1),
    "rows": (lambda o, y: CROSS_ENTROPY(o, y).mean(), (3, 4), jnp.array([0, 3, 1]), roots.Softmax, 9),
    "soft labels": (optax.softmax_cross_entropy, (3,), jnp.array([0.5, 0.3, 0.6]), roots.Softmax, 2),
    "own cross-entropy": (lambda o, y: -jax.nn.log_softmax(o)[y], (4,), jnp.array(1), roots.Labelled, 3),
    "row of one": (lambda o, y: CROSS_ENTROPY(o[None], y[None])[0], (4,), jnp.array(1), roots.Labelled, 3),
    "logsumexp": (lambda o, y: LOG_SUM_EXP(o) - o[y], (4,), jnp.array(3), roots.Labelled, 3),
    "the last by −1": (lambda o, y: LOG_SUM_EXP(o) - o[y], (4,), jnp.array(-1), roots.Labelled, 3),
    "by hand": (lambda o, y: jnp.log(jnp.exp(o).sum()) - o[y], (4,), jnp.array(0), roots.Labelled, 3),
    "prior": (lambda o, y: CROSS_ENTROPY(o + jnp.log(PRIOR), y), (4,), jnp.array(2), roots.Softmax, 3),
    "one-hot": (one_hot_loss, (4,), jnp.array(2), roots.Softmax, 3),
    "no class": (one_hot_loss, (4,), jnp.array(-1), roots.Softmax, 3),
    "product": (lambda o, y: -y @ LOG_SOFTMAX(o), (4,), jnp.array([0.1, 0.2, 0.3, 0.4]), roots.Softmax, 3),
    "class weights": (lambda o, y: PRIOR[y] * (LOG_SUM_EXP(o) - o[y]), (4,), jnp.array(2), roots.Softmax, 3),
    "padding": (
        lambda o, y: jnp.where(y < 0, 0, CROSS_ENTROPY(o, abs(y))).sum() / jnp.maximum((y >= 0).sum(), 1),
        (3, 4), jnp.array([2, -1, 0]), roots.Softmax, 9,
    ),
    "images": (
        lambda o, y: -jnp.take_along_axis(LOG_SOFTMAX(o.reshape(-1, 4)), y.reshape(-1, 1), -1).mean(),
        (2, 2, 4), jnp.array([[0, 3], [1, 1]]), roots.Softmax, 12,
    ),
    "scaled": (lambda o, y: CROSS_ENTROPY(o / 2, y), (4,), jnp.array(1), roots.DenseRoot, 4),
    "and a square": (lambda o, y: CROSS_ENTROPY(o, y) + o[0] ** 2, (4,), jnp.array(1), roots.DenseRoot, 4),
    "squared error": (lambda o, y: ((o - y) ** 2).mean(), (2, 2), jnp.ones((2, 2)), roots.DiagonalRoot, 4),
    "huber": (lambda o, y: optax.huber_loss(o, y).sum(), (3,), jnp.zeros(3), roots.DiagonalRoot, 3),
    "products": (lambda o, y: (o.sum() - y) ** 2, (3,), jnp.array(1.0), roots.DenseRoot, 3),
    "entries meet": (lambda o, y: ((o + o[::-1]) ** 2).sum(), (3,), jnp.array(1.0), roots.DenseRoot, 3),
}  # fmt: skip


@pytest.mark.sampled(2)
@pytest.mark.parametrize("case", list(ROOTS))
def test_root(case):
    loss, shape, y, kind, columns = ROOTS[case]
    output = 2 * jnp.asarray(np.random.default_rng(1).standard_normal(shape))
    root = roots.root_of(loss, *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (output, y)))
    assert isinstance(root, kind)
    found = root.all(output, y).reshape(columns, -1)
    hessian = jax.jit(jax.hessian(loss))(output, y).reshape(output.size, output.size)
    close(found.T @ found, hessian, case)
    key = jax.random.key(0)
    signs = roots.signs(root, key, found.dtype)
    close(root.sampled(output, y, key).reshape(-1), signs @ found, case)


def test_the_audit_says_as_what_the_loss_was_recognised():
    model, params, x = (
        lambda w, x: w @ x,
        jax.ShapeDtypeStruct((3, 2), float),
        jax.ShapeDtypeStruct((5, 2), float),
    )
    labels, targets = jax.ShapeDtypeStruct((5,), int), jax.ShapeDtypeStruct((5, 3), float)
    for loss, y, said in (
        (lambda o, y: LOG_SUM_EXP(o) - o[y], labels, "cross-entropy of a label; 2 columns"),
        (lambda o, y: -y @ LOG_SOFTMAX(o), targets, "softmax cross-entropy; 2 columns"),
        (lambda o, y: jnp.sum((o - y) ** 2), targets, "a sum over entries of the output; 3 columns"),
        (
            lambda o, y: jnp.sum((o - y) ** 2) ** 2,
            targets,
            "the Hessian of one example as a matrix; 3 columns",
        ),
    ):
        audit = fp.per_example(model, loss).audit
        assert f"{said} for each example" in str(audit(params, x, y))
        assert audit(params, x).loss is None
        assert "The loss" not in str(audit(params, x))


def test_a_loss_that_is_not_convex_has_no_root():
    for loss in (lambda o, y: o[0] * o[1], lambda o, y: jnp.sum(-(o**2))):
        found = fp.per_example(lambda w, x: w * x, loss)(
            jnp.ones(2), jnp.ones((1, 2)), jnp.ones(1), ["diag_ggn"]
        )
        assert np.isnan(found["diag_ggn"]).any()
