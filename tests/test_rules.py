"""Every registered rule passes every check; a rule without an example is an error."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import funcprop as fp
from funcprop.testing import CheckError, check_rule


def numbers(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def positive(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).uniform(0.2, 2, shape))


class Example(NamedTuple):
    """Arguments at which a rule is checked, and options of `check_rule`; static arguments among them.

    A `bug` is what the check finds today; the test fails as soon as it is repaired, so that this goes.
    """

    args: tuple[Any, ...]
    options: dict[str, Any] = {}  # noqa: RUF012
    bug: str | None = None


# For each primitive the `jax.lax` function that is this primitive, and examples for it.
PRIMITIVES: dict[str, tuple[Callable[..., Any], list[Example]]] = {
    "tanh": (lax.tanh, [Example((numbers(3, 4),)), Example((numbers(2) + 1j,), {"dtypes": ("float32",)})]),
    "logistic": (lax.logistic, [Example((numbers(3, 4),))]),
    "exp": (lax.exp, [Example((numbers(3, 4),))]),
    "sqrt": (lax.sqrt, [Example((positive(3, 4),))]),
    "rsqrt": (lax.rsqrt, [Example((positive(3, 4),))]),
}

# For each layer with a rule, by its name in `funcprop.layers`, examples with all its arguments.
X, W, B = numbers(4, 3), numbers(3, 2, seed=1), numbers(2, seed=2)
OUTER = "the transpose of `jnp.outer` is a product and a sum: batch × parameters under vmap"
ONE_HOT = "a one-hot per example: batch × parameters where the logits are shared"
ACTIVATION = [Example((numbers(3, 4),))]
LAYERS: dict[str, list[Example]] = {
    "relu": ACTIVATION,
    "tanh": ACTIVATION,
    "sigmoid": ACTIVATION,
    "softplus": ACTIVATION,
    "silu": ACTIVATION,
    "gelu": [*ACTIVATION, Example((numbers(3, 4),), {"approximate": False}, "`ndtr` rejects bfloat16")],
    "dense": [Example((X, W, B)), Example((X, W)), Example((X[0], W, B)), Example((numbers(2, 4, 3), W, B))],
    "linear": [Example((W.T, X[0], B), bug=OUTER), Example((W.T, X[0]), bug=OUTER)],
    "softmax_cross_entropy": [
        Example((X, jnp.array([0, 2, 1, 1])), bug=ONE_HOT),
        Example((X, positive(4, 3))),
        Example((X[0], jnp.array(2)), bug=ONE_HOT),
    ],
    "mean_squared_error": [Example((X, numbers(4, 3, seed=1)))],
    "l2_penalty": [Example((0.3, {"w": W, "b": B})), Example((0.3, W))],
}


def layers_with_rules() -> dict[str, fp.Layer]:
    found = vars(importlib.import_module("funcprop.layers"))
    return {name: x for name, x in found.items() if isinstance(x, fp.Layer) and x.rule is not None}


def cases() -> list[Any]:
    """One test for each example, and one that fails for each operator without any."""
    found: list[tuple[str, Any, Example | None, dict[str, Any]]] = []
    for name in (key for key in fp.rules.handwritten if isinstance(key, str)):
        function, examples = PRIMITIVES.get(name, (None, []))
        operator = fp.rules.handwritten[name]
        options = {"function": function, "primitive": name}
        found += [(f"primitive {name}", operator, example, options) for example in examples or [None]]
    for name, layer in layers_with_rules().items():
        found += [(f"layer {name}", layer, example, {}) for example in LAYERS.get(name) or [None]]
    return [pytest.param(*case, id=f"{case[0]}-{i}", marks=marks(case[2])) for i, case in enumerate(found)]


def marks(example: Example | None) -> list[pytest.MarkDecorator]:
    if example is None or example.bug is None:
        return []
    return [pytest.mark.xfail(strict=True, raises=CheckError, reason=example.bug)]


@pytest.mark.parametrize(("name", "operator", "example", "options"), cases())
def test_every_rule(name: str, operator: Any, example: Example | None, options: dict[str, Any]) -> None:
    assert example is not None, (
        f"{name} has a hand-written rule but no example arguments; add one to the table in {__file__}"
    )
    report = check_rule(operator, *example.args, **options, **example.options)
    assert len(report.rows) >= 15


@pytest.mark.parametrize("table", ["primitives", "layers"])
def test_no_example_is_left_over(table: str) -> None:
    if table == "primitives":
        assert set(PRIMITIVES) <= set(fp.rules.handwritten)
    else:
        assert set(LAYERS) <= set(layers_with_rules())
