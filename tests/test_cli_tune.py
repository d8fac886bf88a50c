"""`funcprop tune`: what is kept for a function on this machine, as text and JSON, and messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from command import module as module  # the fixture
from command import run, run_json

SOURCE = """
    import flax.linen as nn
    def loss(x):
        return jnp.sum(jnp.tanh(nn.max_pool(x, (2, 2), (2, 2))))
    def example():
        return (jax.ShapeDtypeStruct((8, 64, 64, 16), "float32"),)
    """


def test_what_is_kept_by_bytes_and_again_from_the_file(module: Any, tmp_path: Path) -> None:
    target, file = f"{module(SOURCE)}:loss", str(tmp_path / "file.json")
    data = run_json("tune", target, "--objective", "bytes", "--file", file)
    assert data["platform"] == "cpu"
    assert "reduce_window_max" in data["notes"][1]
    assert "of the bytes" in data["notes"][1]
    text = run("tune", target, "--objective", "0", "--file", file).stdout
    assert text.startswith("RuleSet 'measured' on cpu")
    assert run_json("tune", target, "--objective", "bytes", "--file", file)["notes"] == data["notes"]


def test_messages(module: Any, tmp_path: Path) -> None:
    target = f"{module(SOURCE)}:loss"
    file = ("--file", str(tmp_path / "file.json"))
    result = run("tune", target, "--objective", "speed", *file)
    assert result.exit_code == 1
    assert "--objective 'speed': write time, bytes, or a number between 0 and 1" in result.stderr
    result = run("tune", target, *file)
    assert result.exit_code == 1
    assert "a measurement of time needs arrays; return arrays, or pass --objective bytes" in result.stderr
