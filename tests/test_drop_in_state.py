"""What a function does besides its result, such as keys, logs and caches, is as under `jax.grad`."""

from __future__ import annotations

import contextlib
import functools
import itertools
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drop_in import assert_as_jax
from jax import lax

W, Y = jnp.array([1.0, 0.5]), jnp.array([2.0, -1.0])


def three_steps(t, loss):
    w = W
    for _ in range(3):
        w = w - 0.1 * t.grad(loss)(w)
    return w


class Keys:
    """A stateful source of keys."""

    def __init__(self, seed=0):
        self.key = jax.random.key(seed)

    def __next__(self):
        self.key, key = jax.random.split(self.key)
        return key

    def loss(self, w):
        return jnp.sum(jnp.tanh(w) * jax.random.normal(next(self), (2,)))


def stateful_key(t):
    keys = Keys()
    return three_steps(t, keys.loss), jax.random.key_data(keys.key)


def key_of_a_closure(t):
    key = jax.random.PRNGKey(0)

    def loss(w):
        nonlocal key
        key, used = jax.random.split(key)
        return jnp.sum(jnp.tanh(w) * jax.random.bernoulli(used, 0.5, (2,)))

    return three_steps(t, loss), key


def logged(t):
    log = []

    def loss(w, y):
        log.append(jnp.mean(y * 2))
        log.append(("shape", w.shape, jnp.sum(lax.stop_gradient(w)) * 0 + y[0]))
        return jnp.sum(jnp.tanh(w * y))

    gradient = t.grad(loss)(W, Y)
    return gradient, float(log[0]), np.asarray(log[0]), log[1][:2], type(log[0]) is type(W)


def cached_table(t):
    @functools.lru_cache
    def table(n):
        return jnp.sin(jnp.arange(float(n)))

    gradients = [t.grad(lambda w: jnp.sum(jnp.tanh(w) * table(2)))(W) for _ in range(2)]
    return gradients, np.asarray(table(2)), table.cache_info().misses, jax.jit(lambda: table(2) * 2)()


def cache_in_an_attribute(t):
    class Rotary:
        angles = None

        def __call__(self, w):
            if self.angles is None:
                self.angles = jnp.outer(jnp.arange(2.0), jnp.ones(2)).sum(1)
            return jnp.sum(jnp.tanh(w) * jnp.cos(self.angles))

    rotary = Rotary()
    return t.grad(rotary)(W), t.value_and_grad(rotary)(W), np.asarray(rotary.angles)


def running_mean(t):
    class Normed:
        mean, count = jnp.zeros(2), 0

        def loss(self, w, batch):
            self.mean = 0.9 * self.mean + 0.1 * batch
            self.count += 1
            return jnp.sum(jnp.tanh(w * batch - self.mean))

    model = Normed()
    return [t.grad(model.loss)(W, Y * i) for i in range(3)], model.mean * 2, model.count


class Scaled:
    scale, batch = 1.0, Y

    def loss(self, w):
        return jnp.sum(jnp.tanh(w * self.batch)) * self.scale


def what_has_changed_between_calls(t):
    """A gradient made once sees what its function sees: attributes, closures, containers, random state."""
    model, box, y = Scaled(), {"scale": 2.0}, Y
    of_model, of_closure = t.grad(model.loss), t.grad(lambda w: jnp.sum(jnp.tanh(w * y)) * box["scale"])
    found = [of_model(W), of_closure(W)]
    model.scale, model.batch, box["scale"], y = 3.0, Y * 2, 5.0, Y * 3
    found += [of_model(W), of_closure(W)]
    model.batch, model.loss = -Y, lambda w: w
    return [*found, of_model(W), t.hvp(lambda w: jnp.sum(jnp.tanh(w * y)) * box["scale"])(W, W)]


def handlers(t):
    """Effect handlers as of a probabilistic language: a stack of them, entered around the gradient."""
    stack = []

    @contextlib.contextmanager
    def entered(handler):
        stack.append(handler)
        yield handler
        stack.pop()

    def draw(name, location):
        site = {"name": name, "value": None, "location": location}
        for handler in reversed(stack):
            handler(site)
        return site["value"]

    def seed(keys):
        def handle(site):
            site["value"] = site["location"] + jax.random.normal(next(keys))

        return handle

    def record(sites):
        return lambda site: sites.append((site["name"], site["value"]))

    sites = []
    with entered(record(sites)), entered(seed(Keys(1))):

        def loss(w):
            return jnp.sum(jnp.tanh(w) * draw("independent", jnp.mean(Y)))

        gradient = t.grad(loss)(W)
    return gradient, [(name, float(value)) for name, value in sites]


def drawn_once(t):
    """Iterators, counters and NumPy's generators, also where python looks at a value."""
    numbers, rng, calls = itertools.count(1), np.random.default_rng(0), []

    def loss(w, y):
        calls.append(next(numbers))
        noise = rng.standard_normal(2)
        if jnp.any(y > 0):
            w = w * next(numbers)
        for v in (v for v in y if v > 0):
            w = w * v
        return jnp.sum(jnp.tanh(w * noise)) * float(y[0])

    results = [t.value_and_grad(loss)(W, Y), t.grad(loss)(W, -Y), t.jacobian(loss)(W, Y)]
    return results, calls, next(numbers), rng.standard_normal()


def batches_of_a_generator(t):
    def generator():
        for i in range(4):
            yield jnp.full(2, i + 1.0), i

    data = generator()

    def loss(w, data):
        x, i = next(data)
        return jnp.sum(jnp.tanh(w * x)) if x[0] > 1 else jnp.sum(w * i)

    return [t.grad(loss)(W, data) for _ in range(3)], next(data)


def references(t):
    total, count = jax.new_ref(jnp.zeros(2)), jax.new_ref(jnp.zeros((), int))

    def loss(w, flag):
        total[...] = lax.stop_gradient(jnp.tanh(w))
        count[...] += 1
        if flag > 0:
            total[...] += 1
        local = jax.new_ref(w)
        local[0] *= 2
        return jnp.sum(jnp.tanh(w) * total[...]) + jnp.sum(local[...] ** 2)

    return t.grad(loss)(W, jnp.array(1.0)), t.grad(loss)(W, -1.0), total[...], count[...]


def an_error_leaves_nothing_behind(t):
    """It arrives after one call, whether the function raises it, or JAX for a value that it has not."""

    def fails(w):
        calls.append("mine")
        jnp.tanh(w)
        raise KeyError("mine")

    def converts(w):
        calls.append("JAX's")
        return jnp.sum(w) * float(w[0])

    seen, calls = [], []
    for fun in (fails, converts, fails):
        try:
            t.grad(fun)(W)
        except (KeyError, jax.errors.ConcretizationTypeError) as error:
            seen.append((type(error).__name__, isinstance(jnp.ones(2) * 2, jax.core.Tracer)))
    return seen, calls, t.grad(lambda w: jnp.sum(jnp.tanh(w)) if w[0] > 0 else w)(W)


def in_threads(t):
    """Each thread has transformations of its own, also those that run at the same time."""

    def gradient(scale):
        return t.grad(lambda w: jnp.sum(jnp.tanh(w * scale)) if w[0] > 0 else 0.0)(W)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(gradient, [1.0, 2.0, 3.0, 4.0]))


def suspended(t):
    """A generator that is resumed while another gradient is taken."""

    def steps():
        total = jnp.zeros(())
        while True:
            x = yield total
            total = total + t.grad(lambda w, x: jnp.tanh(w) * x)(0.5, x)

    running = steps()
    next(running)
    outer = t.grad(lambda w: jnp.tanh(w) * running.send(jnp.array(2.0)))(0.5)
    return outer, running.send(jnp.array(3.0))


def around_and_inside(t):
    """Gradients inside of gradients, each with python control flow and state."""
    log = []

    def inner(v, y):
        log.append(float(y * 2))
        return jnp.tanh(v) * y if y > 0 else v

    def outer(w, y):
        log.append(float(y))
        return jnp.sum(t.grad(inner)(w[0], y) * w) if y > 0 else jnp.sum(w)

    return t.grad(outer)(W, Y[0]), t.jacobian(t.grad(outer))(W, Y[0]), log


def a_counter_under_jit(t):
    """What happens while a jitted gradient is traced happens once, then not again."""
    calls = []

    def loss(w):
        calls.append(isinstance(w, jax.core.Tracer))
        return jnp.sum(jnp.tanh(w))

    step = jax.jit(t.value_and_grad(loss))
    return [step(W), step(W * 2)], calls


PROGRAMS = [
    stateful_key,
    key_of_a_closure,
    logged,
    cached_table,
    cache_in_an_attribute,
    running_mean,
    what_has_changed_between_calls,
    handlers,
    drawn_once,
    batches_of_a_generator,
    references,
    an_error_leaves_nothing_behind,
    in_threads,
    suspended,
    around_and_inside,
    a_counter_under_jit,
]


@pytest.mark.sampled(8)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_side_effects(program):
    assert_as_jax(program)


@pytest.mark.parametrize("program", [running_mean, drawn_once])
def test_side_effects_without_jit(program):
    def disabled(t):
        with jax.disable_jit():
            return program(t)

    assert_as_jax(disabled)
