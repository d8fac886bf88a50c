"""The chapter's perceptron, trained: mean loss of a minibatch, weight decay, stochastic gradient descent."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Inexact, Int

from funcprop import layers, models
from funcprop.graph.graph import name
from funcprop.models.chapter_model import φ
from funcprop.training.data import Split, minibatches
from funcprop.training.loop import Setup


def chapter(
    data: Split,
    *,
    hidden: int = 128,
    decay: float = 1e-4,
    rate: float = 0.3,
    batch: int = 32,
    epochs: int = 30,
    seed: int = 0,
) -> Setup:
    """Training of `fp.models.chapter` on images: what `funcprop train chapter` runs.

    The loss of a minibatch is the mean objective, `1/B Σ l(W2 φ(W1 x), y) + λ/2 (‖W1‖²_F + ‖W2‖²_F)`; the
    optimizer is plain SGD. Metrics are the loss (without weight decay) and accuracy on the test set.

    Args:
        data: training and test set.
        hidden: width of the hidden layer.
        decay: the strength `λ` of the weight decay.
        rate: learning rate.
        batch: examples in a minibatch.
        epochs: how many times the training set is visited.
        seed: of the initial parameters.

    Raises:
        ValueError: `batch` is larger than the training set.

    Example:
        >>> import funcprop as fp
        >>> setup = fp.training.chapter(fp.training.digits(), epochs=1)
        >>> (epoch,) = fp.training.fit(*setup[:4], epochs=setup.epochs, evaluate=setup.evaluate)
        >>> epoch.metrics["test_accuracy"] > 0.8
        True
    """
    count, pixels = data.train.images.shape
    if not 0 < batch <= count:
        raise ValueError(f"chapter: batch={batch}; choose one between 1 and the {count} training examples.")
    classes = int(max(data.train.labels.max(), data.test.labels.max())) + 1
    params = models.init_chapter(jax.random.key(seed), pixels, hidden, classes)

    def objective(params: Any, x: Inexact[Array, "B d"], y: Int[Array, " B"], λ: Any) -> Inexact[Array, ""]:
        each = jax.vmap(models.chapter, in_axes=(None, 0, 0, None))(params, x, y, λ)
        return name(jnp.mean(each), "mean_J")

    @jax.jit
    def evaluate(params: Any) -> dict[str, Any]:
        x, y = jnp.asarray(data.test.images), jnp.asarray(data.test.labels)
        o = jax.vmap(lambda x: layers.linear(params["W2"], φ(layers.linear(params["W1"], x))))(x)
        losses = layers.softmax_cross_entropy(o, y)
        return {"test_loss": jnp.mean(losses), "test_accuracy": jnp.mean(jnp.argmax(o, -1) == y)}

    def batches(key: Any) -> Any:
        λ = np.float32(decay)
        return ((x, y, λ) for x, y in minibatches(data.train, batch, key))

    return Setup(objective, params, batches, optax.sgd(rate), epochs, evaluate)
