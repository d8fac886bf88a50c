"""Precision matrices `c H + diag(δ)` of four structures, `H` a Gauss-Newton matrix, `δ` a prior's precisions.

All that a Gaussian posterior needs is here: its log-determinant, the covariance of what is linear in the
parameters, and samples. `c` and `δ` are arguments, so that all of it can be differentiated by them. `H` is a
sum over examples; that of two parts of the data is the sum of theirs.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, Scalar

from funcprop.curvature.example_gradients.entering_parameters import Study
from funcprop.curvature.example_gradients.gradient_forms import Factors, GradientForm, OuterProducts
from funcprop.curvature.kronecker import Eigen, Kronecker
from funcprop.operators.parameters import Parameters, times

Jacobian = Sequence[Float[Array, "outputs ..."]]
# The precisions of a prior's entries, leaf by leaf; or, for the structure "full", a matrix.
Prior: TypeAlias = "Sequence[Array] | Array"


class Precision(abc.ABC):
    """`H` in some structure; `scale` is `c` and `prior` has `δ` for every entry, leaf by leaf."""

    structure: ClassVar[str]
    parameters: Parameters

    @abc.abstractmethod
    def logdet(self, scale: Any, prior: Prior) -> Scalar:
        """`log det(c H + diag(δ))`."""

    @abc.abstractmethod
    def covariance(self, jacobian: Jacobian, scale: Any, prior: Prior) -> Float[Array, "o o"]:
        """`J (c H + diag(δ))⁻¹ Jᵀ`, for the leaves' Jacobians `[outputs, *leaf]`."""

    def covariance_of_forms(
        self, study: Study, forms: Sequence[GradientForm], scale: Any, prior: Prior
    ) -> Float[Array, "o o"]:
        """The same, for the Jacobian of one example as gradients of its outputs in each leaf."""
        return self.covariance(list(map(_jacobian, forms)), scale, prior)

    @abc.abstractmethod
    def sample(self, key: PRNGKeyArray, scale: Any, prior: Prior) -> list[Array]:
        """One draw from `N(0, (c H + diag(δ))⁻¹)`, leaf by leaf."""

    @abc.abstractmethod
    def with_more(self, other: Any) -> Precision:
        """`H` of the data of both."""

    def total(self, scale: Any, prior: Prior) -> Any:
        """`c H + P`, the precision itself: leaf by leaf if it is diagonal, or a matrix.

        Raises:
            ValueError: it is neither.
        """
        raise ValueError(
            "laplace: only a posterior with structure='full' or 'diagonal' is the prior of the next data; "
            "fit one of these, or fit all data at once by fp.curvature.over(batches)."
        )

    def _flat(self, leaves: Prior) -> Array:
        return jnp.concatenate([jnp.ravel(leaf) for leaf in leaves])

    def _rows(self, jacobian: Jacobian) -> Float[Array, "o P"]:
        dtype = self.parameters.dtype
        return jnp.concatenate([j.reshape(j.shape[0], -1).astype(dtype) for j in jacobian], axis=1)

    def _leaves(self, flat: Array) -> list[Array]:
        return list(jax.tree.leaves(self.parameters.unravel_results(flat)))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Full(Precision):
    """The matrix itself."""

    structure = "full"
    matrix: Float[Array, "P P"]
    parameters: Parameters = field(metadata={"static": True})

    def with_more(self, other: Any) -> Full:
        """The sum."""
        return replace(self, matrix=self.matrix + other.matrix)

    def total(self, scale: Any, prior: Prior) -> Array:
        """The matrix."""
        return scale * self.matrix + (prior if isinstance(prior, jax.Array) else jnp.diag(self._flat(prior)))

    def _factor(self, scale: Any, prior: Prior) -> Array:
        return jnp.linalg.cholesky(self.total(scale, prior))

    def logdet(self, scale: Any, prior: Prior) -> Scalar:
        """By its Cholesky factor."""
        return 2 * jnp.sum(jnp.log(jnp.diagonal(self._factor(scale, prior))))

    def covariance(self, jacobian: Jacobian, scale: Any, prior: Prior) -> Float[Array, "o o"]:
        """By its Cholesky factor."""
        factor = self._factor(scale, prior)
        half = jax.scipy.linalg.solve_triangular(factor, self._rows(jacobian).T, lower=True)
        return half.T @ half

    def sample(self, key: PRNGKeyArray, scale: Any, prior: Prior) -> list[Array]:
        """`L⁻ᵀ z`."""
        factor = self._factor(scale, prior)
        z = jax.random.normal(key, factor.shape[:1], factor.dtype)
        return self._leaves(jax.scipy.linalg.solve_triangular(factor.T, z, lower=False))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class DiagonalPrecision(Precision):
    """The diagonal of `H`, leaf by leaf; what is beside it counts as zero."""

    structure = "diagonal"
    entries: tuple[Array, ...]
    parameters: Parameters = field(metadata={"static": True})

    def with_more(self, other: Any) -> DiagonalPrecision:
        """The sum."""
        return replace(self, entries=tuple(a + b for a, b in zip(self.entries, other.entries, strict=True)))

    def total(self, scale: Any, prior: Prior) -> list[Array]:
        """Leaf by leaf."""
        return [scale * h + δ for h, δ in zip(self.entries, prior, strict=True)]

    def logdet(self, scale: Any, prior: Prior) -> Scalar:
        """The sum of the logarithms."""
        return jnp.sum(jnp.log(self._flat(self.total(scale, prior))))

    def covariance(self, jacobian: Jacobian, scale: Any, prior: Prior) -> Float[Array, "o o"]:
        """Leaf by leaf."""
        parts = [_product(j, j / t[None]) for j, t in zip(jacobian, self.total(scale, prior), strict=True)]
        return sum(parts[1:], parts[0])

    def covariance_of_forms(
        self, study: Study, forms: Sequence[GradientForm], scale: Any, prior: Prior
    ) -> Float[Array, "o o"]:
        """Of a product without the Jacobian, of which `⟨V a gᵀ, a hᵀ⟩ = Σ_o (V ᵀ a²)_o g_o h_o`."""
        parts = []
        for i, (form, total) in enumerate(zip(forms, self.total(scale, prior), strict=True)):
            layout = study.product_layout(i)
            if isinstance(form, OuterProducts) and layout is not None:
                parts.append(form.weighted_gram(layout.to_matrix(1 / total))[0])
            else:
                j = _jacobian(form)
                parts.append(_product(j, j / total[None]))
        return sum(parts[1:], parts[0])

    def sample(self, key: PRNGKeyArray, scale: Any, prior: Prior) -> list[Array]:
        """Independent entries."""
        precisions = self.total(scale, prior)
        keys = jax.random.split(key, len(precisions))
        return [
            jax.random.normal(k, p.shape, p.dtype) / jnp.sqrt(p)
            for k, p in zip(keys, precisions, strict=True)
        ]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class LowRank(Precision):
    """`H ≈ U diag(s) Uᵀ`, its leading eigenpairs.

    With `V = D^(−½) U √(c s)`, `D = diag(δ)`: `c H + D = D^½ (I + V Vᵀ) D^½`, and all follows from the small
    matrix `I + Vᵀ V`.
    """

    structure = "low-rank"
    values: Float[Array, " k"]
    vectors: Float[Array, "P k"]
    parameters: Parameters = field(metadata={"static": True})

    def with_more(self, other: Any) -> LowRank:
        """Refused: the sum has another rank, and other leading eigenvectors."""
        raise ValueError(
            "merge: posteriors with structure='low-rank' have no sum of that rank; fit all data at once by "
            "fp.curvature.over(batches)(fp.curvature.laplace(…))."
        )

    def _half(self, scale: Any, prior: Prior) -> tuple[Array, Array]:
        """`√δ`, and `V`."""
        root = jnp.sqrt(self._flat(prior))
        # An eigenvalue of a positive semi-definite matrix is negative by rounding alone.
        return root, self.vectors * jnp.sqrt(jnp.maximum(scale * self.values, 0))[None] / root[:, None]

    def logdet(self, scale: Any, prior: Prior) -> Scalar:
        """`Σ log δ + log det(I + Vᵀ V)`."""
        root, V = self._half(scale, prior)
        return (
            2 * jnp.sum(jnp.log(root)) + jnp.linalg.slogdet(jnp.eye(V.shape[1], dtype=V.dtype) + V.T @ V)[1]
        )

    def covariance(self, jacobian: Jacobian, scale: Any, prior: Prior) -> Float[Array, "o o"]:
        """`R Rᵀ − R V (I + Vᵀ V)⁻¹ Vᵀ Rᵀ` with `R = J D^(−½)`."""
        root, V = self._half(scale, prior)
        R = self._rows(jacobian) / root[None]
        small = R @ V
        return R @ R.T - small @ jnp.linalg.solve(jnp.eye(V.shape[1], dtype=V.dtype) + V.T @ V, small.T)

    def sample(self, key: PRNGKeyArray, scale: Any, prior: Prior) -> list[Array]:
        """`D^(−½) (I + V Vᵀ)^(−½) z`, by the eigenvectors of `Vᵀ V`."""
        root, V = self._half(scale, prior)
        z = jax.random.normal(key, root.shape, root.dtype)
        left, singular, _ = jnp.linalg.svd(V, full_matrices=False)
        shrunk = z + left @ ((1 / jnp.sqrt(1 + singular**2) - 1) * (left.T @ z))
        return self._leaves(shrunk / root)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class KroneckerPrecision(Precision):
    """Kronecker products `N A ⊗ G`, one for each leaf, by their eigenvectors.

    Within a leaf the prior's precision is one number: the mean, if it is given for every entry. `factored`
    has the means `A` and `G` over `count` examples.
    """

    structure = "kronecker"
    blocks: tuple[Eigen, ...]
    factored: Kronecker
    count: Scalar
    parameters: Parameters = field(metadata={"static": True})

    @classmethod
    def of(cls, factored: Kronecker, count: Any) -> KroneckerPrecision:
        """That of the mean factors over `count` examples."""
        blocks = [block.eigen().map(lambda values: times(count, values)) for block in factored.blocks]
        return cls(tuple(blocks), factored, jnp.asarray(count), factored.parameters)

    def with_more(self, other: Any) -> KroneckerPrecision:
        """The Kronecker products of the factors' means over all examples, as if all had been one batch."""
        count = self.count + other.count
        factored = self.factored.update(other.factored, self.count / count)
        return KroneckerPrecision.of(factored, count)

    def _damped(self, scale: Any, prior: Prior) -> list[Eigen]:
        return [
            replace(block, values=scale * block.values + jnp.mean(self._flat([prior[i] for i in group])))
            for block, group in self._each(self.blocks)
        ]

    def _each(self, blocks: Sequence[Eigen]) -> Iterator[tuple[Eigen, tuple[int, ...]]]:
        """The blocks with the positions of their leaves."""
        return zip(blocks, self.factored.groups, strict=True)

    def logdet(self, scale: Any, prior: Prior) -> Scalar:
        """The sum of the eigenvalues' logarithms."""
        parts = [jnp.sum(jnp.log(block.values)) for block in self._damped(scale, prior)]
        return sum(parts[1:], parts[0])

    def covariance(self, jacobian: Jacobian, scale: Any, prior: Prior) -> Float[Array, "o o"]:
        """Leaf by leaf, in the eigenbasis."""
        parts = []
        for block, group in self._each(self._damped(scale, prior)):
            mine = [jacobian[i] for i in group]
            solved = jax.vmap(block.map(lambda values: 1 / values))(*mine)
            parts += [_product(j, s) for j, s in zip(mine, solved, strict=True)]
        return sum(parts[1:], parts[0])

    def covariance_of_forms(
        self, study: Study, forms: Sequence[GradientForm], scale: Any, prior: Prior
    ) -> Float[Array, "o o"]:
        """Of a product without the Jacobian, in the eigenbasis."""
        parts = []
        for block, group in self._each(self._damped(scale, prior)):
            mine = [forms[i] for i in group]
            if len(mine) == 1 and isinstance(mine[0], OuterProducts):
                turned = mine[0].turned(Factors(block.ua, block.ug))
                parts.append(turned.weighted_gram(1 / block.values)[0])
                continue
            j = list(map(_jacobian, mine))
            solved = jax.vmap(block.map(lambda values: 1 / values))(*j)
            parts += [_product(a, b) for a, b in zip(j, solved, strict=True)]
        return sum(parts[1:], parts[0])

    def sample(self, key: PRNGKeyArray, scale: Any, prior: Prior) -> list[Array]:
        """The inverse's square root times white noise."""
        keys = jax.random.split(key, len(prior))
        noise = [jax.random.normal(k, δ.shape, δ.dtype) for k, δ in zip(keys, prior, strict=True)]
        for block, group in self._each(self._damped(scale, prior)):
            drawn = block.map(lambda values: 1 / jnp.sqrt(values))(*(noise[i] for i in group))
            for i, found in zip(group, drawn, strict=True):
                noise[i] = found
        return noise


def _jacobian(form: GradientForm) -> Array:
    """The gradients of all outputs of the one example."""
    return form.each(slice(None))[:, 0]


def _product(left: Array, right: Array) -> Float[Array, "o o"]:
    """Inner products of rows, which are like a leaf."""
    return left.reshape(len(left), -1) @ right.reshape(len(right), -1).T
