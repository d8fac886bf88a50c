"""`funcprop report`: the page is written, and what is wrong with a setup is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from command import module as module  # the fixture
from command import run, run_json

TARGET = """
    import optax
    def loss(w, x):
        return jnp.mean((x @ w) ** 2)
    def with_aux(w, x):
        return loss(w, x), {"predictions": x @ w}
    def example():
        return jnp.ones(2), jnp.ones((3, 2))
    def setup():
        return fp.training.Setup(loss, jnp.ones(2), [(jnp.ones((3, 2)),)], optax.sgd(0.1), epochs=4)
"""


def test_the_command_writes_the_page(module: Any, tmp_path: Path) -> None:
    name = module(TARGET)
    result = run("report", f"{name}:loss", "--epochs", "2")
    assert result.stdout.startswith("loss.html: J = 4, ")
    assert "2 of 2 epochs" in (tmp_path / "loss.html").read_text("utf-8")
    data = run_json("report", f"{name}:with_aux", "--has-aux", "--out", str(tmp_path / "other.html"))
    assert (data["value"], data["title"]) == (4.0, f"{name}:with_aux")
    assert (tmp_path / "other.html").stat().st_size == data["bytes"]
    assert len(data["training"]["metrics"]["loss"]) == 4
    assert {v["name"] for v in data["variables"]} >= {"w", "x"}
    assert "cannot be written" in run("report", f"{name}:loss", "--out", "/nowhere/a.html").stderr


def test_setup_that_fails_is_the_users_to_mend(module: Any) -> None:
    name = module(TARGET + "    def setup():\n        return 1 / 0\n")
    result = run("report", f"{name}:loss")
    assert result.exit_code == 1
    assert "setup() of its module failed" in result.stderr
    assert "return 1 / 0" in result.stderr
