"""The training loop against plain formulas, the data, and every way in which a data file can be wrong."""

import gzip
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from idx_files import idx, write_split

import funcprop as fp
from funcprop import training
from funcprop.training import DataError


def squared(w: Any, x: Any) -> Any:
    return jnp.mean((w - x) ** 2)


BATCHES = [(jnp.array([1.0, 3.0]),), (jnp.array([5.0, 3.0]),)]


# --- one step ---------------------------------------------------------------------------------


def test_step_is_gradient_descent() -> None:
    w, x = jnp.array([1.0, -2.0]), jnp.array([0.5, 0.5])
    sgd = optax.sgd(0.1)
    expected = w - 0.1 * jax.grad(squared)(w, x)
    stepped, _, loss = training.make_step(squared, sgd)(jnp.array(w), sgd.init(w), (x,))
    np.testing.assert_allclose(stepped, expected, rtol=1e-14)
    np.testing.assert_allclose(loss, squared(w, x), rtol=1e-14)


def test_step_donates_parameters_and_state() -> None:
    w = jnp.ones(1000)
    momentum = optax.sgd(0.1, momentum=0.9)
    state = momentum.init(w)
    step = training.make_step(squared, momentum)
    memory = step.lower(w, state, (w * 2,)).compile().memory_analysis()
    assert memory.alias_size_in_bytes == 2 * w.nbytes
    step(w, state, (w * 2,))
    assert w.is_deleted()
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_step_uses_the_rules() -> None:
    calls = []

    def backward(residuals: Any, g: Any, needs: Any, **_: Any) -> tuple[Any]:
        calls.append(1)
        return (g * (1 - residuals**2),)

    rule = fp.Rule(lambda x, **_: (jnp.tanh(x),) * 2, backward)
    step = training.make_step(
        lambda w: jnp.tanh(w), optax.sgd(1.0), rules=fp.rules.autodiff.replace({"tanh": rule})
    )
    w, _, _ = step(jnp.array(0.0), optax.sgd(1.0).init(0.0), ())
    assert calls
    assert w == -1.0


@pytest.mark.parametrize(
    "batch", [{"x": jnp.ones(2)}, training.Dataset(np.ones((2, 1)), np.ones(2)), jnp.ones(2)]
)
def test_only_plain_tuples_and_lists_are_spread(batch: Any) -> None:
    assert training.apply_loss(lambda params, b: b, 0, batch) is batch
    assert training.apply_loss(lambda params, a, b: (b, a), 0, [1, 2]) == (2, 1)


# --- epochs -----------------------------------------------------------------------------------


def test_fit_reports_the_mean_loss_before_the_updates() -> None:
    w, expected = 0.0, []
    for _ in range(3):
        losses = []
        for (x,) in BATCHES:
            losses.append(np.mean((w - x) ** 2))
            w -= 0.25 * 2 * np.mean(w - x)
        expected.append(np.mean(losses))
    epochs = list(training.fit(squared, jnp.array(0.0), BATCHES, optax.sgd(0.25), epochs=3))
    np.testing.assert_allclose([e.metrics["loss"] for e in epochs], expected, rtol=1e-14)
    np.testing.assert_allclose(epochs[-1].params, w, rtol=1e-14)
    assert [e.number for e in epochs] == [1, 2, 3]


def test_what_fit_receives_and_yields_stays_valid() -> None:
    given = jnp.array(0.0)
    epochs = list(training.fit(squared, given, BATCHES, optax.adam(0.1), epochs=3))
    assert not given.is_deleted()
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves([(e.params, e.state) for e in epochs]))


def test_training_can_be_continued() -> None:
    adam = optax.adam(0.1)
    *_, whole = training.fit(squared, jnp.array(0.0), BATCHES, adam, epochs=4)
    *_, half = training.fit(squared, jnp.array(0.0), BATCHES, adam, epochs=2)
    *_, rest = training.fit(squared, half.params, BATCHES, adam, epochs=2, state=half.state)
    np.testing.assert_array_equal(whole.params, rest.params)


def test_batches_may_be_a_function_of_a_key() -> None:
    keys = []

    def batches(key: Any) -> Any:
        keys.append(key)
        return iter(BATCHES)

    list(training.fit(squared, jnp.array(0.0), batches, optax.sgd(0.1), epochs=2, key=jax.random.key(3)))
    assert len(keys) == 2
    assert not jnp.array_equal(*map(jax.random.key_data, keys))


def test_evaluate_adds_metrics() -> None:
    (epoch,) = training.fit(
        squared, jnp.array(0.0), BATCHES, optax.sgd(0.1), epochs=1, evaluate=lambda w: {"twice": 2 * w}
    )
    assert epoch.metrics["twice"] == 2 * epoch.params


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"epochs": -1}, ValueError, "epochs=-1; pass the number of epochs"),
        ({"batches": iter(BATCHES), "epochs": 2}, ValueError, "nothing in epoch 2; an iterator is used up"),
        ({"evaluate": lambda w: {"loss": w}}, ValueError, "metric named 'loss'.*call it 'test_loss'"),
        (
            {"params": jnp.array(jnp.inf)},
            FloatingPointError,
            r"loss \(inf\) of step 1 .* of w is not finite.*lower",
        ),
        ({"loss": lambda w, x: w - x}, TypeError, "a gradient is of one scalar"),
    ],
)
def test_errors_of_fit(change: dict[str, Any], error: type[Exception], message: str) -> None:
    setup = {"loss": squared, "params": jnp.array(0.0), "batches": BATCHES, "optimizer": optax.sgd(0.1)}
    with pytest.raises(error, match=message):
        list(training.fit(**{**setup, **change}))


# --- the chapter ------------------------------------------------------------------------------


def test_chapter_trains_the_chapters_objective() -> None:
    rng = np.random.default_rng(0)
    data = training.Dataset(rng.uniform(size=(20, 6)).astype(np.float32), rng.integers(0, 3, 20))
    setup = training.chapter(training.Split(data, data), hidden=5, batch=4, decay=0.1)
    x, y, λ = next(iter(setup.batches(jax.random.key(0))))
    w1, w2 = setup.params["W1"], setup.params["W2"]
    o = jnp.tanh(x @ w1.T) @ w2.T
    data_loss = optax.softmax_cross_entropy_with_integer_labels(o, y).mean()
    penalty = λ / 2 * (jnp.sum(w1**2) + jnp.sum(w2**2))
    np.testing.assert_allclose(setup.loss(setup.params, x, y, λ), data_loss + penalty, rtol=1e-12)
    o = jnp.tanh(data.images @ w1.T) @ w2.T
    assert setup.evaluate is not None
    assert setup.evaluate(setup.params)["test_accuracy"] == jnp.mean(o.argmax(-1) == data.labels)


@pytest.mark.parametrize("rules", [fp.rules.autodiff, fp.rules.handwritten], ids=lambda rules: rules.name)
def test_chapter_gradient_of_a_minibatch(rules: fp.RuleSet) -> None:
    setup = training.chapter(training.digits(), hidden=5, batch=4)
    batch = next(iter(setup.batches(jax.random.key(0))))
    expected = jax.grad(setup.loss)(setup.params, *batch)
    for found in (
        fp.grad(setup.loss, rules=rules)(setup.params, *batch),
        fp.backprop(setup.loss, rules=rules)(setup.params, *batch).gradient,
    ):
        for name in ("W1", "W2"):
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-6, atol=1e-9)


def test_chapter_needs_enough_examples() -> None:
    with pytest.raises(ValueError, match="batch=5000; choose one between 1 and the 1438"):
        training.chapter(training.digits(), batch=5000)


# --- data -------------------------------------------------------------------------------------


def test_digits_are_split_the_same_way_every_time() -> None:
    first, second, other = training.digits(), training.digits(), training.digits(seed=1)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(first.train.labels, other.train.labels)
    images = np.concatenate([first.train.images, first.test.images])
    assert images.shape == (1797, 64)
    assert images.min() == 0
    assert images.max() == 1
    # Every digit is in one of the two sets, whatever the shuffle.
    others = np.concatenate([other.train.images, other.test.images])
    np.testing.assert_array_equal(*(np.sort(x.view("V256").ravel()) for x in (images, others)))
    assert set(first.test.labels) == set(range(10))


def test_errors_of_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="test_fraction=1 leaves 0 of 1797"):
        training.digits(test_fraction=1)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'funcprop\[experiments\]'"):
        training.digits()


def test_minibatches_visit_every_example_once() -> None:
    x = np.arange(12)
    batches = list(training.minibatches((x, -x), 4, jax.random.key(0)))
    assert all(np.array_equal(a, -b) for a, b in batches)
    seen = np.concatenate([a for a, _ in batches])
    assert sorted(seen) == list(x)
    assert list(seen) != list(x)
    again = np.concatenate([a for a, _ in training.minibatches((x, -x), 4, jax.random.key(0))])
    np.testing.assert_array_equal(seen, again)


def test_minibatches_are_a_sequence() -> None:
    made = training.minibatches((np.arange(11),), 4, jax.random.key(0))
    assert len(made) == 2
    np.testing.assert_array_equal(made[-1][0], list(made)[1][0])
    np.testing.assert_array_equal(made[1:][0][0], made[1][0])
    with pytest.raises(IndexError):
        made[2]


def test_minibatches_leave_out_a_remainder() -> None:
    assert [len(a) for (a,) in training.minibatches((np.arange(11),), 4)] == [4, 4]


@pytest.mark.parametrize(
    ("arrays", "size", "message"),
    [
        ((np.ones(3), np.ones(4)), 1, r"\[3, 4\] examples"),
        ((np.ones(3),), 4, "size=4; choose one between 1 and the 3"),
        ((np.ones(3),), 0, "size=0"),
    ],
)
def test_errors_of_minibatches(arrays: Any, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        training.minibatches(arrays, size)


# --- IDX files --------------------------------------------------------------------------------


@pytest.mark.parametrize("compressed", [False, True])
def test_fashion_mnist_round_trip(tmp_path: Path, compressed: bool) -> None:
    arrays = write_split(tmp_path, compressed)
    train, test = training.fashion_mnist(tmp_path)
    np.testing.assert_allclose(train.images * 255, arrays["train-images-idx3-ubyte"].reshape(30, 20))
    np.testing.assert_array_equal(train.labels, arrays["train-labels-idx1-ubyte"])
    np.testing.assert_array_equal(test.labels, arrays["t10k-labels-idx1-ubyte"])
    assert test.images.dtype == np.float32
    assert test.images.shape == (20, 20)


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
GOOD = idx(np.zeros((30, 4, 5)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param(
            IMAGES,
            None,
            r"no such file, nor with \.gz; .* contains t10k-images-idx3-ubyte, t10k-labels",
            id="missing",
        ),
        pytest.param(IMAGES, b"", "begins with nothing; expected an IDX magic number, 00 00 08", id="empty"),
        pytest.param(
            IMAGES, b"\x89PNG\r\n", "begins with 89 50 4e 47; expected an IDX magic number", id="png"
        ),
        pytest.param(
            IMAGES,
            b"\0\0\x0d" + GOOD[3:],
            r"data type is 0x0d \(float32\); expected 0x08 \(uint8\)",
            id="float32",
        ),
        pytest.param(
            IMAGES, b"\0\0\x77" + GOOD[3:], r"data type is 0x77 \(unknown\); expected 0x08", id="unknown_type"
        ),
        pytest.param(IMAGES, idx(np.zeros((30, 20))), "has 2 dimensions; expected 3", id="two_dimensions"),
        pytest.param(
            IMAGES, GOOD[:10], "has 10 bytes; expected a header of 16 bytes for 3 dimensions", id="cut_header"
        ),
        pytest.param(
            IMAGES,
            GOOD[:-1],
            r"599 bytes of data follow the header; expected 600 .* shape \(30, 4, 5\)",
            id="cut_data",
        ),
        pytest.param(
            IMAGES, GOOD + b"\0", "601 bytes of data follow the header; expected 600", id="too_long"
        ),
        pytest.param(IMAGES, gzip.compress(GOOD)[:-9], "expected a complete gzip file", id="cut_gzip"),
        pytest.param(IMAGES, b"\x1f\x8b\x08" + bytes(40), "expected a complete gzip file", id="broken_gzip"),
        pytest.param(
            IMAGES,
            idx(np.zeros((0, 4, 5))),
            r"shape \(0, 4, 5\); expected at least one image",
            id="no_images",
        ),
        pytest.param(
            LABELS,
            idx(np.zeros(29)),
            "29 labels; expected 30, one for every image in train-images-idx3-ubyte",
            id="too_few_labels",
        ),
        pytest.param(
            LABELS,
            idx(np.array([*[3] * 28, 10, 255])),
            "label 28 is 10; expected classes from 0 to 9",
            id="label_range",
        ),
        pytest.param(
            "t10k-images-idx3-ubyte",
            idx(np.zeros((20, 4, 4))),
            "16 pixels; expected 20, as in the training",
            id="other_size",
        ),
    ],
)
def test_errors_of_idx_files(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    write_split(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        training.fashion_mnist(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / name))


def test_directory_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere is not a directory"):
        training.fashion_mnist(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"nowhere: No such file or directory; expected an IDX file"):
        training.read_idx(tmp_path / "nowhere")


# --- the import -------------------------------------------------------------------------------


def test_import_is_light() -> None:
    heavy = ["sklearn", "rich", "typer", "flax", "equinox", "haiku", "matplotlib"]
    code = f"import sys, funcprop; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_setup_unpacks_into_fit() -> None:
    setup = training.Setup(squared, jnp.array(0.0), BATCHES, optax.sgd(0.25), epochs=1)
    loop: Callable[..., Any] = training.fit
    (epoch,) = loop(*setup[:4], epochs=setup.epochs, evaluate=setup.evaluate)
    assert epoch.metrics == {"loss": 7.5}
