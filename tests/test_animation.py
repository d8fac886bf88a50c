"""The animation of both sweeps: its steps, its numbers, its files."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from PIL import Image

import funcprop as fp
from funcprop.cli.target import chapter_example


def numbers_of_the_chapter() -> tuple[float, float]:
    """The loss and the penalty, written down."""
    params, x, y, decay = chapter_example()
    h = jnp.tanh(params["W1"] @ x)
    loss = -jax.nn.log_softmax(params["W2"] @ h)[y]
    return float(loss), float(decay / 2 * sum(jnp.sum(w**2) for w in params.values()))


def test_the_steps_are_the_two_sweeps_with_their_numbers() -> None:
    movie = fp.animate(fp.models.chapter)(*chapter_example())
    captions = [frame.caption for frame in movie.frames]
    loss, penalty = numbers_of_the_chapter()
    assert captions[4:7] == [
        f"forward 4 of 6: L = {loss:.3g}",
        f"forward 5 of 6: s = {penalty:.3g}",
        f"forward 6 of 6: J = {loss + penalty:.3g}",
    ]
    assert captions[7] == "backward 1 of 6: ∂J/∂L = 1, ∂J/∂s = 1"
    gradient = jax.grad(fp.models.chapter)(*chapter_example())["W1"]
    assert captions[-1] == f"backward 6 of 6: ‖∂J/∂W1‖ = {float(jnp.linalg.norm(gradient)):.3g}"
    assert len(movie) == 13
    # Once computed, a value stays; the backward sweep begins where the forward sweep ends.
    for before, after in zip(movie.frames, movie.frames[1:], strict=False):
        assert before.forward <= after.forward
        assert before.backward <= after.backward
    assert not any(frame.backward for frame in movie.frames[:7])


def test_files_play(tmp_path: Path) -> None:
    movie = fp.animate(fp.models.chapter, seconds=0.5)(*chapter_example())
    movie.save(tmp_path / "sweeps.gif")
    image = Image.open(io.BytesIO((tmp_path / "sweeps.gif").read_bytes()))
    assert (image.n_frames, image.info["duration"], image.info["loop"]) == (13, 500, 0)
    movie.save(tmp_path / "sweeps.svg")
    root = ElementTree.fromstring((tmp_path / "sweeps.svg").read_text("utf-8"))
    steps = [e for e in root.iter() if e.tag.endswith("animate")]
    assert len(steps) == 13
    assert {step.get("dur") for step in steps} == {"6.5s"}
    movie.save(tmp_path / "sweeps.html")
    assert "<script" not in (tmp_path / "sweeps.html").read_text("utf-8")
    assert "<animate" in movie._repr_html_()


def test_what_cannot_be_shown_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has 117 operators, too many to be seen; animate a"):
        fp.animate(lambda x: sum(jnp.sin(x * i) for i in range(1, 40)))(1.0)
    movie = fp.animate(lambda x: x**2)(3.0)
    with pytest.raises(
        fp.DrawingError, match=r"fp.animate: path='movie.mp4' ends in '.mp4'; write one of .gif"
    ):
        movie.save("movie.mp4")
