"""`funcprop draw`: files, formats, the three pictures, and a clear message for what cannot be drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from command import module as module  # the fixture
from command import run, run_json

import funcprop as fp
from funcprop.cli.target import chapter_example


def test_the_chapter_in_every_format(tmp_path: Path) -> None:
    drawing = fp.draw(fp.trace(fp.models.chapter)(*chapter_example()))
    assert run("draw", "chapter").stdout == drawing.svg() + "\n"
    assert run("draw", "chapter", "--format", "mermaid").stdout == drawing.mermaid() + "\n"
    for name, text in (("a.dot", drawing.dot()), ("a.mmd", drawing.mermaid()), ("a.json", drawing.json())):
        assert run("draw", "chapter", "--out", str(tmp_path / name)).stdout.endswith("17 nodes, 18 arrows\n")
        assert (tmp_path / name).read_text("utf-8") == text
    run("draw", "chapter", "--out", str(tmp_path / "a.txt"), "--format", "svg")
    assert (tmp_path / "a.txt").read_text("utf-8") == drawing.svg()


def test_json_has_the_picture() -> None:
    data = run_json("draw", "chapter")
    assert (data["target"], data["out"], data["format"]) == ("chapter", None, "svg")
    squares = {n["label"] for n in data["picture"]["nodes"] if n["kind"] == "variable"}
    assert squares == {"x", "W1", "z", "h", "W2", "o", "y", "L", "s", "λ", "J"}
    edge = next(e for e in data["picture"]["edges"] if e["variable"] == "W1")
    assert edge["shape"] == [3, 4]


def test_both_sweeps_and_second_derivatives() -> None:
    backward = run_json("draw", "chapter", "--backward", "--depth", "0")
    assert {box["label"] for box in backward["picture"]["boxes"]} == {"forward", "backward"}
    crossing = [e["nbytes"] for e in backward["picture"]["edges"] if e["kind"] == "residual"]
    assert sum(crossing) == backward["residual_bytes"] > 0
    orders = ("forward-over-reverse", "reverse-over-reverse")
    forward, reverse = (run_json("draw", "chapter", "--second", "--order", order) for order in orders)
    assert forward["classes"] != reverse["classes"]
    assert all(forward["classes"].values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "graph.jpg"], "its suffix does not say what to write; use one of .svg, .html"),
        (["--out", "graph.dot", "--format", "svg"], "is not --format svg"),
        (
            ["--format", "bmp"],
            "--format 'bmp' is not known; choose one of svg, html, png, pdf, dot, mermaid, json",
        ),
        (["--out", "/nowhere/graph.dot"], "cannot be written: No such file or directory"),
        (["--backward", "--second"], "are two pictures"),
        (["--second", "--order", "sideways"], "order='sideways' is not known"),
        (["--backward", "--argnums", "all"], "--argnums all is not for `draw`"),
        (["--backward", "--argnums", "2"], "no array with a derivative"),
        (["--backward", "--argnums", "9"], "names argument 9"),
    ],
)
def test_what_cannot_be_drawn_is_said(options: list[str], message: str) -> None:
    result = run("draw", "chapter", *options)
    assert result.exit_code == 1
    assert message in result.stderr
    assert not result.stdout


def test_targets_that_do_not_trace(module: Any) -> None:
    name = module("""
        def broken(x):
            return x if x > 0 else -x
        def vector(x):
            return jnp.sin(x)
        def example():
            return (jax.ShapeDtypeStruct((2,), "float32"),)
        """)
    result = run("draw", f"{name}:broken")
    assert result.exit_code == 1
    assert "drawing failed" in result.stderr
    assert "return x if x > 0" in result.stderr
    assert "/funcprop/drawing/" not in result.stderr
    assert "need one real scalar" in run("draw", f"{name}:vector", "--second").stderr
    assert run_json("draw", f"{name}:vector", "--types")["picture"]["nodes"]
