"""What cannot be meant is refused in one line that names the argument, its value and the remedy."""

import jax.numpy as jnp
import optax
import pytest

import funcprop as fp


def loss(w, x):
    return jnp.sum((x @ w) ** 2)


W, X = jnp.ones((3, 2)), jnp.ones((4, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: fp.derive(loss, argnums=5)(W, X),
            "argnums=5, but .* arguments; choose among 0, 1",
        ),
        (
            lambda: fp.derive(loss)(W, X).verify(tolerance=-1),
            "tolerance=-1 is no deviation; pass a number",
        ),
        (lambda: fp.draw(fp.trace(loss)(W, X), loops="yes"), "loops='yes' is no number of levels; pass 0"),
        (lambda: fp.draw(fp.trace(loss)(W, X), 7), "path=7 is no file; pass its name, such as 'net.svg'"),
        (lambda: fp.layer(3), "fp.layer: 3 is not a function; write @fp.layer above one"),
        (
            lambda: fp.partition.plan(loss, optimizer=optax.sgd(0.1))(W, X, devices=0),
            "devices=0: pass at least 1",
        ),
    ],
)
def test_it_is_refused_with_a_remedy(call, message):
    with pytest.raises((ValueError, TypeError, fp.DrawingError), match=message) as refused:
        call()
    assert len(str(refused.value).splitlines()) == 1
