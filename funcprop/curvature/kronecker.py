"""Block-diagonal curvature whose blocks are Kronecker products: KFAC and EKFAC.

A parameter that enters as `W[n] = Σ_t a[n, t] ⊗ g[n, t]` has the Gauss-Newton block
`1/N Σ_n Σ_c vec(W) vec(W)ᵀ`. KFAC approximates it by `A ⊗ G`. With R positions `t` that share the weights:

    expand:  A = 1/N Σ_n 1/R Σ_t a aᵀ,                 G = 1/N Σ_{n,t,c} g gᵀ
    reduce:  A = 1/N Σ_n (1/R Σ_t a)(1/R Σ_t a)ᵀ,      G = 1/N Σ_{n,c} (Σ_t g)(Σ_t g)ᵀ

Only positions count that the loss sees: R is the number of those of example n that have a cotangent other
than zero, `Σ_t a` is over them, and of several positions `A` is the mean over the N examples that have any.
So nothing depends on how far sequences are padded.

`g` are cotangents of the *unaveraged* loss of one example for the columns `c` of its root, so that `A ⊗ G` is
of the loss's **mean** over the batch, without a factor ½. A parameter without an outer product (a bias, a
norm's scale) has `A = (1)` and for `G` its whole block, or its diagonal if it has more than 1024 entries. One
that enters in several places has its whole block if that is small; of a larger one all uses are one set of
positions, or, where they are not products in the same orientation, there is the diagonal. A table of which
rows are taken has a diagonal `A`. `fp.per_example(…).audit(…)` says which it is for every parameter.

References: Martens and Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature",
ICML 2015; Grosse and Martens, "A Kronecker-factored approximate Fisher matrix for convolution layers", ICML
2016; Botev, Ritter and Barber, ICML 2017 (exact columns: KFLR); George et al., "Fast approximate natural
gradient descent in a Kronecker-factored eigenbasis", NeurIPS 2018; Eschenhagen et al., "Kronecker-factored
approximate curvature for modern neural network architectures", NeurIPS 2023 (expand and reduce).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, Scalar
from wadler_lindig import pformat

from funcprop.curvature.example_gradients.joint_layers import JointLayout
from funcprop.curvature.example_gradients.matrix_layout import MatrixLayout
from funcprop.operators.finite import nonfinite_rows, require_finite
from funcprop.operators.linear_operator import LinearOperator
from funcprop.operators.parameters import Parameters, shown, single_at_least, times
from funcprop.operators.solvers import require_damping

METHODS = ("pi", "eigenvalue")


def multiply(factor: Any, blocks: Any, axis: int) -> Any:
    """A factor times blocks `[k, i, o]` along `i` (axis 1) or `o` (axis 2); a vector is a diagonal."""
    blocks = blocks.astype(single_at_least(factor.dtype, blocks.dtype))
    if factor.ndim == 1:
        return blocks * (factor[:, None] if axis == 1 else factor)
    if axis == 1:
        return factor @ blocks
    return blocks @ jnp.swapaxes(factor, -1, -2)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class KroneckerProduct:
    """`A ⊗ G` of one parameter, or of a matrix and its bias, with both factors.

    `total` is `A` times `seen`, the share of the examples that it has a part of (some positions of an example
    are seen by the loss, but of an example none may be): both are means over all examples, and so can be
    averaged over batches.
    """

    __repr__ = pformat  # shapes instead of entries

    total: Array
    g: Array
    seen: Array
    layout: MatrixLayout | JointLayout = field(metadata={"static": True})

    @classmethod
    def of(cls, a: Array, g: Array, layout: MatrixLayout | JointLayout) -> KroneckerProduct:
        """That of two factors."""
        return cls(a, g, jnp.ones(a.shape[:1] if a.ndim == 3 else (), a.dtype), layout)

    @property
    def a(self) -> Array:
        """The factor of activations."""
        seen = jnp.where(self.seen > 0, self.seen, 1)
        return self.total / (seen[:, None, None] if seen.ndim else seen)

    def __call__(self, *leaves: Any) -> list[Any]:
        """The product with a parameter, or with a matrix and its bias."""
        blocks = self.layout.to_matrix(*leaves)
        return self.layout.to_leaves(multiply(self.g, multiply(self.a, blocks, 1), 2))

    @jax.jit
    def eigen(self) -> Eigen:
        """Decompose the block: the same matrix by its eigenvectors."""
        (a, ua), (g, ug) = _eigh(self.a), _eigh(self.g)
        values = jnp.broadcast_to(a[..., :, None] * g[..., None, :], self.layout.matrix)
        return Eigen(ua, ug, values, self.layout)

    @jax.jit
    def inverse(self, damping: Any) -> KroneckerProduct:
        """`(A + π√λ I)⁻¹ ⊗ (G + √λ/π I)⁻¹` with `π² = (tr A / dim A) / (tr G / dim G)`.

        Where a factor is one number for each block the block is the other, and is damped exactly.
        """
        if self.a.shape[-1] == 1:
            g = self.g * (self.a if self.g.ndim == 1 else self.a.reshape(*self.a.shape[:-1], 1)[..., :1])
            return KroneckerProduct.of(jnp.ones_like(self.a), _inverse(g, damping), self.layout)
        mean_a, mean_g = _mean_eigenvalue(self.a), _mean_eigenvalue(self.g)
        ratio = jnp.where((mean_a > 0) & (mean_g > 0), mean_a / jnp.where(mean_g > 0, mean_g, 1), 1)
        pi, root = jnp.sqrt(ratio), jnp.sqrt(damping)
        return KroneckerProduct.of(_inverse(self.a, pi * root), _inverse(self.g, root / pi), self.layout)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Eigen:
    """`(U_a ⊗ U_g) diag(values) (U_a ⊗ U_g)ᵀ`, as `KroneckerProduct`; ones are the basis of a diagonal."""

    __repr__ = pformat  # shapes instead of entries

    ua: Array
    ug: Array
    values: Array
    layout: MatrixLayout | JointLayout = field(metadata={"static": True})

    def __call__(self, *leaves: Any) -> list[Any]:
        """The product with a parameter, or with a matrix and its bias."""
        blocks = multiply(_turned(self.ug), multiply(_turned(self.ua), self.layout.to_matrix(*leaves), 1), 2)
        return self.layout.to_leaves(multiply(self.ug, multiply(self.ua, self.values * blocks, 1), 2))

    def eigen(self) -> Eigen:
        """Itself."""
        return self

    def map(self, fun: Callable[[Any], Any]) -> Eigen:
        """Change the eigenvalues and keep the eigenvectors."""
        return replace(self, values=fun(self.values))

    def diagonal_in(self, ua: Any, ug: Any) -> Any:
        """The diagonal in another basis, `diag(Uᵀ A U)`; each is a mean of eigenvalues."""
        return multiply(_weights(ug, self.ug), multiply(_weights(ua, self.ua), self.values, 1), 2)


def _weights(new: Any, old: Any) -> Any:
    """How much of each old eigenvector each new one has, squared."""
    return jnp.ones_like(old) if old.ndim == 1 else (_turned(new) @ old) ** 2


def _turned(basis: Any) -> Any:
    return basis if basis.ndim == 1 else jnp.swapaxes(basis, -1, -2)


def _eigh(factor: Any) -> tuple[Any, Any]:
    """Eigenvalues, of which none is negative, and eigenvectors."""
    if factor.ndim == 1:
        return jnp.maximum(factor, 0), jnp.ones_like(factor)
    values, vectors = jnp.linalg.eigh(_full_precision(factor))
    return jnp.maximum(values, 0), vectors


def _full_precision(factor: Any) -> Any:
    """LAPACK has no half precision."""
    return factor.astype(single_at_least(factor.dtype))


def _mean_eigenvalue(factor: Any) -> Any:
    return (
        factor.mean() if factor.ndim == 1 else jnp.trace(factor, axis1=-2, axis2=-1).mean() / factor.shape[-1]
    )


def _inverse(factor: Any, damping: Any) -> Any:
    if factor.ndim == 1:
        return 1 / (factor + damping)
    factor = _full_precision(factor)
    return jnp.linalg.inv(factor + damping * jnp.eye(factor.shape[-1], dtype=factor.dtype))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class Kronecker(LinearOperator):
    """A block-diagonal operator with a Kronecker-factored block for each parameter; `fp.kfac`, `fp.ekfac`.

    It is a pytree, and everything of `LinearOperator` works on it. `groups` are the positions of each block's
    parameters: of one, or of a matrix and its bias.
    """

    blocks: tuple[KroneckerProduct | Eigen, ...]
    parameters: Parameters = field(metadata={"static": True})
    groups: tuple[tuple[int, ...], ...] = field(metadata={"static": True})

    has_mean = True

    def merged(self, other: Any, share: Any) -> Kronecker:
        """The operator of the factors' means, which is that of all data.

        Raises:
            ValueError: an operator is in its eigenbasis, which is another for other data.
        """
        if any(isinstance(block, Eigen) for block in self.blocks):
            raise ValueError(
                "accumulate: a Kronecker operator in its eigenbasis (ekfac, sqrt) has no mean with others; "
                "use fp.curvature.over(batches)(fp.ekfac(…))(params), which takes two passes."
            )
        return self.update(other, 1 - share)

    def linear_map(self) -> Callable[[PyTree], PyTree]:
        """Each block by itself."""
        names = self.parameters
        return lambda v: names.unflatten(self._products(dict(enumerate(jax.tree.leaves(v)))))

    def _products(self, leaves: Mapping[int, Any]) -> list[Any]:
        """The product's leaves, of those that are not zero."""
        names = self.parameters
        found = [jnp.zeros(*pair) for pair in zip(names.shapes, names.dtypes, strict=True)]
        for block, group in zip(self.blocks, self.groups, strict=True):
            if leaves.keys() & set(group):
                for i, product in zip(group, block(*(leaves.get(i, found[i]) for i in group)), strict=True):
                    found[i] = product.astype(names.dtypes[i])
        return found

    def block_map(self, rows: Sequence[int], columns: Sequence[int]) -> Callable[[Sequence[Any]], list[Any]]:
        """Zero between different blocks."""

        def apply(parts: Sequence[Any]) -> list[Any]:
            found = self._products(dict(zip(columns, parts, strict=True)))
            return [found[i] for i in rows]

        return apply

    @property
    def factors(self) -> Mapping[str, tuple[Array, Array]]:
        """`(A, G)` of each block, by the path of its (first) parameter.

        A vector stands for a diagonal, a stack of matrices for independent blocks (layers that a loop stacks,
        groups of a convolution).

        Raises:
            ValueError: the operator is in its eigenbasis.
        """
        found = {}
        for group, block in zip(self.groups, self.blocks, strict=True):
            if not isinstance(block, KroneckerProduct):
                raise ValueError(
                    "factors: the operator is in its eigenbasis (ekfac, sqrt); it has no factors."
                )
            found[self.parameters.paths[group[0]]] = (block.a, block.g)
        return found

    def inverse(self, damping: Any, *, method: str = "pi") -> Kronecker:
        """The inverse of the operator with its damping λ.

        Args:
            damping: a number ≥ 0.
            method: "pi", `(A + π√λ I)⁻¹ ⊗ (G + √λ/π I)⁻¹` with `π` the root of the ratio of mean eigenvalues
                (Martens and Grosse 2015, section 6.3), and exactly where `A` is a number (a bias, a norm's
                scale, a block that is kept whole); "eigenvalue", exactly `(A ⊗ G + λ I)⁻¹`, the only one
                for an operator in its eigenbasis.

        Raises:
            ValueError: `damping` is negative, `method` is not known, or an undamped block is singular.
            FloatingPointError: the operator is not finite; the message has the parameter's path.
        """
        require_damping(damping)
        require_method(method, "inverse")
        blocks = [
            block.inverse(damping)
            if method == "pi" and isinstance(block, KroneckerProduct)
            else block.eigen().map(lambda values: 1 / (values + damping))
            for block in self.blocks
        ]
        inverse = replace(self, blocks=tuple(blocks))
        require_finite(self, self.blocks, "inverse()")
        concrete = not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(inverse.blocks))
        broken = nonfinite_rows(inverse) if concrete else []
        if broken:
            raise ValueError(
                f"inverse: with damping={damping}, the blocks of {shown(*broken)} are singular; add damping."
            )
        return inverse

    def logdet(self, damping: Any = 0.0, **_: Any) -> Scalar:
        """`log det(A + damping I)`, of the eigenvalues; -inf where one is zero.

        Raises:
            ValueError: `damping` is negative.
            FloatingPointError: the operator is not finite; the message has the parameter's path.
        """
        require_damping(damping)
        require_finite(self, self.blocks, "logdet()")
        return sum(jnp.sum(jnp.log(block.eigen().values + damping)) for block in self.blocks)  # type: ignore[return-value]

    def sqrt(self, **_: Any) -> Kronecker:
        """The symmetric square root."""
        return replace(self, blocks=tuple(block.eigen().map(jnp.sqrt) for block in self.blocks))

    def update(self, other: Kronecker, decay: Any) -> Kronecker:
        """The moving average `decay · self + (1 − decay) · other` of the factors.

        Of operators in their eigenbases (ekfac) it is that of the operators, in the basis of `other`, with
        the eigenvalues that are the best for it in the Frobenius norm: `diag(Uᵀ (decay · self) U)` and so on.

        Raises:
            ValueError: the operators are of different parameters or kinds, or `decay` is not in [0, 1].
        """
        if not isinstance(decay, jax.core.Tracer) and not 0 <= decay <= 1:
            raise ValueError(f"update: decay={decay}; pass the share of the past, from 0 to 1.")
        of_both = [(k.parameters, k.groups, [*map(type, k.blocks)]) for k in (self, other)]
        if of_both[0] != of_both[1]:
            raise ValueError("update: the operators are of different parameters, or of different kinds.")
        blocks: list[KroneckerProduct | Eigen] = []
        for mine, new in zip(self.blocks, other.blocks, strict=True):
            if isinstance(mine, KroneckerProduct) and isinstance(new, KroneckerProduct):
                average = lambda a, b: times(decay, a) + times(1 - decay, b)  # noqa: E731
                total, g, seen = map(average, (mine.total, mine.g, mine.seen), (new.total, new.g, new.seen))
                blocks.append(KroneckerProduct(total, g, seen, mine.layout))
            elif isinstance(mine, Eigen) and isinstance(new, Eigen):
                past = mine.diagonal_in(new.ua, new.ug)
                blocks.append(replace(new, values=times(decay, past) + times(1 - decay, new.values)))
        return replace(self, blocks=tuple(blocks))


def require_method(method: str, of: str) -> None:
    """Raise a ValueError if there is no such way for the damping to enter an inverse."""
    if method not in METHODS:
        raise ValueError(f"{of}: method={method!r} is not known; choose one of {', '.join(METHODS)}.")
