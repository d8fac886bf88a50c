"""`funcprop partition`: the plans as text and JSON, for devices here and not here, and messages."""

from __future__ import annotations

from typing import Any

import jax
import pytest
from command import module as module  # the fixture
from command import run, run_json

SOURCE = """
    def loss(w, x, y):
        return jnp.mean((jnp.tanh(x @ w[0]) @ w[1] - y) ** 2)
    def example():
        shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, "float32")
        return [shape(16, 32), shape(32, 8)], shape(8, 16), shape(8, 8)
    """


def test_plans_as_text_and_json(module: Any) -> None:
    target = f"{module(SOURCE)}:loss"
    data = run_json("partition", target, "--devices", "2", "--budget", "2GB", "--axes", "--prove")
    names = [plan["name"] for plan in data["plans"]]
    assert {"data 2", "one device", "zero 2"} <= set(names)
    assert all(plan["fits"] for plan in data["plans"])
    assert data["proof"]["name"] == names[0]
    assert 0.5 < data["proof"]["ratio"] < 2
    assert data["axes"][0]["why"] is None
    assert "bytes/device" in run("partition", target, "--devices", "2").stdout


def test_plans_for_devices_that_are_not_here(module: Any) -> None:
    data = run_json("partition", f"{module(SOURCE)}:loss", "--on", "v5e:2x2", "--optimizer", "sgd")
    assert {"data": 4} in [plan["mesh"] for plan in data["plans"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--devices", "99"], f"devices=99, of which there are {jax.device_count()}; use no more"),
        (["--on", "v9"], "on='v9' is not known; write kind:shape, as v5e:4x4"),
        (["--budget", "much"], "--budget 'much': write bytes, such as 100000, 64MB or 1.5GiB."),
        (["--optimizer", "best"], "--optimizer 'best' is not known; choose one of sgd"),
    ],
)
def test_what_cannot_be_planned_is_said(module: Any, options: list[str], message: str) -> None:
    result = run("partition", f"{module(SOURCE)}:loss", *options)
    assert result.exit_code == 1
    assert message in result.stderr


def test_a_module_with_functions_is_planned_by_its_arrays(module: Any) -> None:
    source = """
        import equinox as eqx
        def loss(net, x, y):
            return jnp.mean((jax.vmap(net)(x) - y) ** 2)
        def example():
            net = eqx.nn.MLP(4, 3, 8, 1, activation=jax.nn.silu, key=jax.random.key(0))
            return net, jnp.ones((8, 4)), jnp.ones((8, 3))
        """
    data = run_json("partition", f"{module(source)}:loss", "--devices", "2")
    assert {"data 2", "one device"} <= {plan["name"] for plan in data["plans"]}
