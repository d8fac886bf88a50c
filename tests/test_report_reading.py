"""A report in the browser for reading: hostile names, contrast, themes, narrow screens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from chromium import contrasts, opened, saved
from playwright.sync_api import Browser
from report_pages import HOSTILE
from report_pages import browser as browser
from report_pages import chapter as chapter
from report_pages import hostile as hostile

import funcprop as fp


def test_hostile_names_stay_text(browser: Browser, hostile: tuple[fp.Report, Path]) -> None:
    for page, *_ in opened(browser, hostile):
        assert page.title() == f"{HOSTILE} · funcprop"
        assert page.locator("h1").text_content() == HOSTILE
        assert page.locator("img, b:not(.brand b), main i").count() == 0
        square = page.locator(f'#canvas [data-name="{HOSTILE}"]')
        square.dispatch_event("click")
        assert page.locator("#panel h3").text_content() == HOSTILE
        assert page.locator("#equations mi", has_text=HOSTILE[-20:]).count() > 0
        page.locator("#values button", has_text=HOSTILE).click()
        assert page.locator("#panel img").count() == 0
        page.locator("#position").fill(page.locator("#position").get_attribute("max"))
        assert page.locator("img").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(browser: Browser, hostile: tuple[fp.Report, Path], scheme: str) -> None:
    for page, *_ in opened(browser, hostile, color_scheme=scheme, reduced_motion="reduce"):
        last = int(page.locator("#position").get_attribute("max"))
        page.locator('#canvas [data-name="J"]').first.dispatch_event("click")
        page.locator("details summary").first.click()
        for position in (0, last // 4, 3 * last // 4, last):
            page.locator("#position").fill(str(position))
            measured = contrasts(page)
            assert len(measured) > 200
            assert [text for ratio, text in measured if ratio < 4.5] == []


def test_the_theme_is_the_systems_until_it_is_chosen(
    browser: Browser, chapter: tuple[fp.Report, Path]
) -> None:
    dark = "getComputedStyle(document.body).backgroundColor"
    for page, *_ in opened(browser, chapter, color_scheme="dark"):
        night = page.evaluate(dark)
        page.click("#theme")
        day = page.evaluate(dark)
        assert day != night
        assert page.locator("#theme").text_content() == "Dark theme"
        page.emulate_media(color_scheme="light")
        assert page.evaluate(dark) == day
        page.click("#theme")
        assert page.evaluate(dark) == night


def test_a_phone(browser: Browser, hostile: tuple[fp.Report, Path]) -> None:
    size = {"width": 390, "height": 844}
    for page, report, *_ in opened(browser, hostile, viewport=size, has_touch=True, is_mobile=True):
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        for button in page.locator("button:visible:not(.link)").all():
            box = button.bounding_box()
            assert min(box["width"], box["height"]) >= 24
            assert 0 <= box["x"] <= box["x"] + box["width"] <= 390
        first = page.locator(f'#canvas [data-key="{report.drawing.picture.origin}"]')
        first.tap()
        assert page.locator("#panel h3").text_content() == first.get_attribute("data-name")
        page.tap("#next")
        assert "Forward 1 of" in page.locator("#caption").text_content()


_CLIPPED = """() => [...document.querySelectorAll("body *")].filter((e) => {
  const style = getComputedStyle(e);
  const hides = ["hidden", "clip"].includes(style.overflowX);
  return hides && e.clientWidth && e.scrollWidth > e.clientWidth + 1 && !e.closest("svg, math")
    && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
}).map((e) => e.className + ": " + e.textContent.trim().slice(0, 40))"""


# Outside of pictures and formulas, nobody has to read letters of less than 12 pixels.
_SMALL = """() => [...document.querySelectorAll("body *")].filter((e) =>
  !e.closest("svg, math, sub, sup") && e.checkVisibility() && parseFloat(getComputedStyle(e).fontSize) < 11.9
    && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())
).map((e) => e.className + ": " + e.textContent.trim().slice(0, 40))"""
# The answers of the exercises are read without scrolling sideways.
_WIDER = """() => [...document.querySelectorAll(".questions .scroll")].filter((e) =>
  e.scrollWidth > e.clientWidth + 1).map((e) => e.getAttribute("aria-label"))"""


@pytest.mark.parametrize("width", [390, 768, 1280, 1920])
def test_nothing_is_clipped(
    browser: Browser, chapter: tuple[fp.Report, Path], hostile: tuple[fp.Report, Path], width: int
) -> None:
    for made in (chapter, hostile):
        for found in opened(browser, made, viewport={"width": width, "height": 900}):
            assert found.page.evaluate(_CLIPPED) == []
            assert found.page.evaluate(_SMALL) == []
            assert found.page.evaluate(_WIDER) == []
            assert found.page.evaluate("document.documentElement.scrollWidth") <= width
            # The whole picture is seen at once, and there is no panel until a node is chosen.
            canvas = found.page.locator("#canvas").bounding_box()
            box = found.page.locator("#canvas > svg:visible").bounding_box()
            assert canvas is not None
            assert box is not None
            assert box["width"] <= canvas["width"] + 1
            assert found.page.locator("#panel").is_hidden()
            nodes = found.page.evaluate(
                """() => [...document.querySelectorAll("#canvas > svg:not([hidden]) [data-node]")]
                  .map((g) => g.getBoundingClientRect()).map((r) => [r.left, r.right, r.top, r.bottom])"""
            )
            assert nodes
            for left, right, top, bottom in nodes:
                assert left >= canvas["x"] - 1
                assert right <= canvas["x"] + canvas["width"] + 1
                assert top >= canvas["y"] - 1
                assert bottom <= canvas["y"] + canvas["height"] + 1


def test_modules_open_and_close(browser: Browser, tmp_path: Path) -> None:
    """A model of modules is seen as these, and each opens in the place of the whole."""
    shape = jax.ShapeDtypeStruct
    layers = [(shape((6, 6), float), shape((6,), float))] * 8

    def loss(layers: Any, x: Any) -> Any:
        for w, b in layers:
            x = jnp.tanh(x @ w + b) * jnp.cos(x @ w) + jnp.sin(x)
        return jnp.sum(x**2)

    report = fp.report(loss, fold=True)(layers, shape((2, 6), float))
    assert all(len(picture.drawing.picture.nodes) <= 60 for picture in report.pictures)
    path = tmp_path / "page.html"
    report.save(path)
    for found in opened(browser, (report, path)):
        page = found.page
        module = page.locator("#canvas > svg:visible .opens").first
        if len(report.pictures) > 1:
            module.click()
            assert page.locator("#path button").count() == 2
            assert page.locator("#panel").is_visible()
            page.locator("#path button").first.click()
        assert page.locator("#canvas > svg:visible").count() == 1


def test_names_in_the_picture_can_be_read_on_a_phone(
    browser: Browser, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A picture that is wide on a screen has shorter rows there, and begins at a scale that can be read."""

    def wide(ws: Any, x: Any) -> Any:
        for i, w in enumerate(ws):
            x = fp.name(jnp.tanh(x @ w * (i + 1)) + i, f"h{i}")
        return jnp.sum(x)

    shape = jax.ShapeDtypeStruct
    made = fp.report(wide)([shape((4, 4), float)] * 4, shape((4,), float))
    path = saved(made, tmp_path_factory)
    for page, *_ in opened(browser, (made, path), viewport={"width": 390, "height": 844}):
        label = page.locator("#canvas svg text", has_text="ws/0").first
        assert label.bounding_box()["height"] >= 8
        assert label.bounding_box()["x"] < 390
