"""Functions of arrays: `jnp`, `lax`, `jax.nn`, `jax.scipy`, FFT, linear algebra, indexing, cumulative."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.ode import odeint

from zoo.entry import Family, integers, normal, uniform

FAMILY = Family()


@FAMILY()
def elementwise():
    def loss(x, y):
        z = jnp.tanh(x) * jnp.exp(-y) + jnp.sqrt(x * x + 1) / lax.rsqrt(y + 2.0)
        z = z + jax.nn.sigmoid(x) - jnp.log1p(y**2) + jnp.arctan2(x, y + 3) + jnp.hypot(x, y)
        z = jnp.where(z > 0, jnp.cbrt(z + 1), jnp.expm1(z)) + jnp.clip(x, -0.5, 0.5) + jnp.maximum(x, y)
        return jnp.sum(z + x % 1.5 + jnp.sinc(x) + lax.integer_pow(y, 3) + jnp.abs(x) ** 1.5)

    return loss, (normal(0, 3, 4), uniform(1, 3, 4))


@FAMILY()
def jax_nn_activations():
    names = ("relu", "relu6", "gelu", "silu", "elu", "selu", "celu", "softplus", "sparse_plus", "sigmoid",
             "hard_tanh", "hard_swish", "leaky_relu", "log_sigmoid", "soft_sign", "mish", "squareplus",
             "softmax", "log_softmax", "standardize", "glu", "logsumexp")  # fmt: skip

    def loss(x):
        return sum(jnp.sum(jnp.sin(i + getattr(jax.nn, name)(x))) for i, name in enumerate(names))

    return loss, (normal(0, 3, 4),)


@FAMILY(tolerance=1e-5)
def jax_nn_attention():
    """It computes its softmax in float32."""

    def loss(qkv, mask):
        out = jax.nn.dot_product_attention(*qkv, mask=mask, is_causal=True)
        return jnp.sum(out**2)

    return loss, (tuple(normal(i, 2, 4, 2, 3) for i in range(3)), integers(3, 2, 2, 1, 4, 4) == 0)


@FAMILY()
def scipy_special():
    def loss(x):
        special = jax.scipy.special
        return jnp.sum(
            special.erf(x) + special.gammaln(x) * special.digamma(x) + special.logit(x / 3)
            + special.i0e(x) + special.xlogy(x, x) + special.ndtri(x / 2) + special.entr(x)
            + jax.scipy.stats.norm.logcdf(x) + jax.scipy.stats.gamma.logpdf(x, 2.0)
            + jax.scipy.stats.t.logpdf(x, 3.0)
        ) + special.logsumexp(x, b=2.0)  # fmt: skip

    return loss, (uniform(0, 6),)


@FAMILY()
def fft_complex_inside():
    def loss(x, kernel):
        spectrum = jnp.fft.rfft(x) * jnp.fft.rfft(kernel, n=x.shape[-1])
        turned = jnp.fft.fftn(jnp.exp(1j * x) * jnp.tanh(x + 0.1j))
        return jnp.sum(jnp.fft.irfft(spectrum) ** 2) + jnp.sum(jnp.abs(turned) ** 2) + jnp.angle(turned[0, 1])

    return loss, (normal(0, 2, 8), normal(1, 2, 3))


@FAMILY(twice=False)
def complex_parameters():
    """The gradient of a real loss in complex parameters, in JAX's convention."""

    def loss(params, x):
        z = jnp.tanh(params["w"] @ x + params["b"]) * jnp.exp(1j * params["phase"])
        return jnp.sum(jnp.real(z * jnp.conj(z)) + jnp.imag(jnp.sqrt(z)))

    params = {
        "w": normal(0, 3, 4) + 1j * normal(1, 3, 4),
        "b": normal(2, 3) + 1j * normal(3, 3),
        "phase": normal(4, 3),
    }
    return loss, (params, normal(5, 4))


@FAMILY()
def linalg_cholesky_solve():
    def loss(a, b):
        spd = a @ a.T + 3 * jnp.eye(4)
        factor = jnp.linalg.cholesky(spd)
        y = jax.scipy.linalg.solve_triangular(factor, b, lower=True)
        return jnp.sum(y**2) + jnp.sum(jnp.linalg.solve(spd, b) ** 2) + jnp.linalg.slogdet(a)[1]

    return loss, (normal(0, 4, 4), normal(1, 4, 2))


@FAMILY()
def linalg_decompositions():
    def loss(a):
        values, vectors = jnp.linalg.eigh(a + a.T)
        q, r = jnp.linalg.qr(a)
        singular = jnp.linalg.svd(a, compute_uv=False)
        return (
            jnp.sum(jnp.sqrt(values**2 + 1)) + jnp.sum(vectors[0] ** 4) + jnp.sum(jnp.abs(r)) + q[0, 0]
            + jnp.sum(singular**3) + jnp.sum(jnp.linalg.inv(a)) + jnp.linalg.det(a)
            + jnp.sum(jax.scipy.linalg.expm(a / 4)) + jnp.sum(jnp.linalg.norm(a, axis=0))
        )  # fmt: skip

    return loss, (normal(0, 3, 3),)


@FAMILY()
def sort_and_top_k():
    def loss(x, keys):
        values, indices = lax.top_k(x, 3)
        by_key = lax.sort((keys, x), num_keys=1)[1]
        quantiles = jnp.quantile(x, jnp.array([0.3, 0.8])) + jnp.median(x) + jnp.max(x)
        return (
            jnp.sum(values**3) + x[indices[0]] + jnp.sum(jnp.sort(x)[::2] * by_key[:4]) + jnp.sum(quantiles)
        )

    return loss, (normal(0, 8), normal(1, 8))


@FAMILY()
def gather_scatter():
    def loss(table, indices):
        rows = jnp.take(table, indices, axis=0)
        scattered = jnp.zeros((5, 4)).at[indices % 5].add(jnp.tanh(rows))
        scattered = scattered.at[0].set(rows[0]).at[1].multiply(2.0).at[2, ::2].max(0.1)
        sliced = lax.dynamic_slice(table, (indices[0], 0), (2, 3))
        updated = lax.dynamic_update_slice(table, sliced, (indices[1], 1))
        segments = jax.ops.segment_sum(rows, indices % 3, num_segments=3)
        along = jnp.take_along_axis(table, indices[:, None] % 4, axis=1)[:, 0]
        return sum(jnp.sum(jnp.sin(z)) for z in (scattered, updated, segments, along, table[1:, [0, 2]]))

    return loss, (normal(0, 6, 4), integers(1, 6, 6))


@FAMILY()
def cumulative():
    def loss(x):
        combined = lax.associative_scan(lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1]), (x, jnp.exp(-x)))
        return jnp.sum(
            jnp.cumsum(x, 0) * jnp.cumprod(x, 1) + lax.cummax(x, 0) + lax.cumlogsumexp(x, 1, reverse=True)
            + combined[0] * combined[1]
        ) + jnp.trapezoid(x[0]) + jnp.prod(x)  # fmt: skip

    return loss, (uniform(0, 3, 4),)


@FAMILY()
def einsum():
    def loss(params, x):
        a, b, c = params
        y = jnp.einsum("bij,jk,bkl->bil", a, b, c)
        trace = jnp.einsum("bii->b", y @ y.mT)
        return (
            jnp.sum(jnp.tanh(trace))
            + jnp.sum(jnp.tensordot(y, x, ((1, 2), (0, 1))))
            + jnp.sum(jnp.kron(b, b))
        )

    return loss, ((normal(0, 2, 3, 2), normal(1, 2, 4), normal(2, 2, 4, 3)), normal(3, 3, 3, 2))


@FAMILY()
def shapes():
    """What moves numbers without changing them."""

    def loss(x):
        padded = lax.pad(x, 0.0, [(1, 0, 1), (0, 2, 0)])
        pieces = jnp.split(jnp.concatenate([x, x[::-1]], 1), 2, axis=1)
        rolled = jnp.roll(jnp.stack(pieces), 1, axis=2).transpose(2, 0, 1).reshape(-1)
        tiled = jnp.tile(jnp.broadcast_to(x[:1], (2, 4)), (2, 1)) * jnp.triu(jnp.ones((4, 4)))
        empty = x[:, :0]
        return sum(jnp.sum(z**2 * jnp.cos(z)) for z in (padded, rolled, tiled, empty, jnp.diagonal(x)))

    return loss, (normal(0, 3, 4),)


@FAMILY()
def convolution_and_pooling():
    def loss(params, x):
        y = lax.conv_general_dilated(
            x, params["kernel"], (2, 1), "SAME", rhs_dilation=(1, 2), feature_group_count=2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        pooled = lax.reduce_window(y, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
        summed = lax.reduce_window(y, 0.0, lax.add, (1, 2, 2, 1), (1, 1, 1, 1), "VALID")
        resized = jax.image.resize(y, (2, 5, 5, 4), "bilinear")
        return sum(jnp.sum(jnp.tanh(z)) for z in (pooled, summed, resized)) + jnp.sum(
            jnp.convolve(params["line"], x[0, 0, :, 0])
        )

    return loss, ({"kernel": normal(0, 3, 3, 1, 4), "line": normal(1, 3)}, normal(2, 2, 6, 6, 2))


@FAMILY()
def random_draws():
    """Reparametrised samples, with keys of both styles."""

    def loss(params, new, old):
        mean, log_scale = params
        z = mean + jnp.exp(log_scale) * jax.random.normal(new, mean.shape)
        gamma = jax.random.gamma(jax.random.fold_in(new, 1), jnp.exp(mean))
        mask = jax.random.bernoulli(old, 0.7, z.shape)
        return jnp.sum(jnp.where(mask, z / 0.7, 0.0) ** 2) + jnp.sum(gamma)

    return loss, ((normal(0, 4), normal(1, 4)), jax.random.key(0), jax.random.PRNGKey(1))


@FAMILY()
def tied_unused_repeated():
    """One matrix twice, one leaf never used, one result of an operator used three times."""

    def loss(params, x):
        h = jnp.tanh(x @ params["w"])
        y = h @ params["w"].T + h @ params["w"].T * h.sum() + params["integer_like"].astype(int).sum()
        return jnp.sum(y * y) + lax.stop_gradient(jnp.sum(params["w"])) * jnp.sum(h)

    params = {"w": normal(0, 3, 3), "unused": normal(1, 2), "integer_like": normal(2, 2)}
    return loss, (params, normal(3, 2, 3))


@FAMILY()
def implicit_solvers():
    """Derivatives through `custom_linear_solve` and `custom_root`."""

    def loss(a, b):
        spd = a @ a.T + 3 * jnp.eye(3)
        x, _ = jax.scipy.sparse.linalg.cg(lambda v: spd @ v, b, tol=1e-14)
        root = lax.custom_root(
            lambda r: r**3 + r - jnp.tanh(b), b,
            lambda f, r: lax.fori_loop(0, 40, lambda _, r: r - f(r) / (3 * r**2 + 1), r),
            lambda g, y: y / g(jnp.ones_like(y)),
        )  # fmt: skip
        return jnp.sum(x**2) + jnp.sum(root * a)

    return loss, (normal(0, 3, 3), normal(1, 3))


@FAMILY(twice=False)
def differential_equation():
    """The adjoint of `odeint` is an `odeint` again, which has no forward mode."""

    def loss(a, b):
        path = odeint(lambda y, t, a: -a @ jnp.tanh(y), b, jnp.linspace(0.0, 1.0, 3), a)
        return jnp.sum(path**2)

    return loss, (normal(0, 3, 3), normal(1, 3))
