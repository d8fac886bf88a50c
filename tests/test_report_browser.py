"""The report in headless Chromium: every node opens, both sweeps run, the keyboard works, nothing is hidden.

Without Chromium these tests are skipped; where the environment has FUNCPROP_BROWSER=required they fail.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from chromium import Opened, contrasts, launched, opened, saved
from flax import linen as nn
from playwright.sync_api import Browser, Page

import funcprop as fp
from funcprop.cli.target import chapter_example

HOSTILE = "</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    yield from launched()


@pytest.fixture(scope="module")
def chapter(tmp_path_factory: pytest.TempPathFactory) -> tuple[fp.Report, Path]:
    setup = fp.training.Setup(
        lambda w, x: jnp.mean((w - x) ** 2), jnp.array(0.0), [(jnp.ones(3),)], optax.sgd(0.1)
    )
    report = fp.report(fp.models.chapter, setup=setup, epochs=3)(*chapter_example())
    return report, saved(report, tmp_path_factory)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return x + nn.Dense(3, param_dtype=float)(nn.tanh(nn.LayerNorm(param_dtype=float)(x)))


class Blocks(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        for _ in range(3):
            x = Block()(x)
        return x


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[fp.Report, Path]:
    """Three equal Flax blocks, a loop, and names that would be markup."""
    model, x = Blocks(), jnp.ones((2, 3))
    params = model.init(jax.random.key(0), x)

    def loss(weights: Any, x: Any) -> Any:
        hidden = model.apply(weights["model"], x) @ weights[HOSTILE]
        with jax.named_scope("<b>scope</b>"):
            total = fp.name(jnp.tanh(hidden), "<i>&amp;</i>")
        return fp.name(jax.lax.scan(lambda c, h: (c + jnp.sum(h**2), None), 0.0, total)[0], "J")

    report = fp.report(loss, title=HOSTILE)({"model": params, HOSTILE: jnp.ones((3, 2))}, x)
    return report, saved(report, tmp_path_factory)


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> tuple[fp.Report, Path]:
    """A scan whose values are known: `c = w c + x`."""

    def looped(w: Any, x: Any) -> Any:
        c, _ = jax.lax.scan(lambda c, x: (fp.name(w * c + x, "c"), None), jnp.zeros(2), x)
        return fp.name(jnp.sum(c), "J")

    x = jnp.tile(jnp.arange(1.0, 5.0)[:, None], 2)
    report = fp.report(looped)(jnp.array(0.5), x)
    return report, saved(report, tmp_path_factory)


@pytest.fixture(params=["chapter", "hostile"])
def either(request: pytest.FixtureRequest, browser: Browser) -> Iterator[Opened]:
    yield from opened(browser, request.getfixturevalue(request.param))


@pytest.fixture
def page(browser: Browser, chapter: tuple[fp.Report, Path]) -> Iterator[Opened]:
    yield from opened(browser, chapter, reduced_motion="no-preference")


# --- nodes ------------------------------------------------------------------------------------


def test_every_nodes_panel_opens(either: Opened) -> None:
    page, nodes = either.page, either.report.drawing.picture.nodes
    groups = page.locator("#canvas [data-node]")
    assert groups.count() == len(nodes)
    symbols = {n.name: n.label for n in nodes}
    for i in range(len(nodes)):
        group = groups.nth(i)
        group.dispatch_event("click")
        name, kind = group.get_attribute("data-name"), group.get_attribute("class").split()[0]
        heading = page.locator("#panel h3").text_content()
        assert heading is not None
        if kind == "funcprop-variable":
            assert heading == name
        else:
            op = next(op for op in either.report.opened.shown.graph if op.name == name)
            assert heading.split()[-1] == op.op
            assert heading.startswith(symbols[name].split("\n")[0]) or heading == op.op
        assert "chosen" in group.get_attribute("class")
        if page.locator("#panel .statistics dd").count():
            assert page.locator("#panel .statistics dd").first.text_content() not in ("", "–")
        else:
            # A value inside of a loop, of which the sweeps keep only what is computed.
            assert "[body]/" in name
            assert kind == "funcprop-variable"
            assert "Nothing is known of its numbers" in page.locator("#panel .note").text_content()
        page.keyboard.press("Escape")
        assert page.locator("#panel h3").count() == 0


def test_what_is_inside_of_a_loop(browser: Browser, loop: tuple[fp.Report, Path]) -> None:
    """Shape and bytes are those of one step; values and gradients are over all steps, in closed form here."""
    for page, report, *_ in opened(browser, loop):
        (box,) = (b for b in report.drawing.picture.boxes if b.label == "scan × 4")
        assert page.locator(f'#canvas [data-key="{box.key}"]').count() == 1
        panel = page.locator("#panel")

        def show(name: str, page: Page = page) -> None:
            page.locator(f'#canvas [data-name="{name}"]').dispatch_event("click")

        show("scan[body]/c")
        assert panel.locator(".about").first.text_content() == "float64[2] · 16 B · value inside of a loop"
        # c = 0.5 c + x from 0, with x = 1, 2, 3, 4 in both entries.
        least, largest = panel.locator("div.of-value dd").nth(0), panel.locator("div.of-value dd").nth(1)
        assert (float(least.text_content()), float(largest.text_content())) == (1.0, 6.125)
        assert panel.locator("div.of-value dd").nth(6).text_content() == "8"
        # Its gradient in the last step is 1, and half of that in every one before.
        gradient = panel.locator("div.of-gradient dd")
        assert (float(gradient.nth(0).text_content()), float(gradient.nth(1).text_content())) == (0.125, 1.0)
        assert panel.locator("math").count() > 0
        panel.locator(".links button", has_text="c[t−1]").click()
        assert "Nothing is known of its numbers" in panel.locator(".note").text_content()
        assert panel.locator(".links button", has_text="scan[body]/c").count() == 1
        show("scan[body]/x[t]")
        assert float(panel.locator("div.of-value dd").nth(1).text_content()) == 4.0
        panel.get_by_role("button", name="scan", exact=True).click()
        assert panel.locator("h3").text_content() == "scan"
        # The step in which the loop runs lights all that is inside of it.
        steps = [op.name for op in report.graph]
        page.locator("#position").fill(str(steps.index("scan") + 1))
        inside = {op.name for op in report.opened.operators["scan"]}
        assert inside <= set(lit(page, "forward"))


def test_a_real_click_and_a_hover(page: Opened) -> None:
    square = page.page.locator('#canvas [data-name="W1"]')
    square.hover()
    tip = page.page.locator("#tip")
    assert "float64[3,4]" in tip.text_content()
    assert "‖gradient‖" in tip.text_content()
    square.click()
    panel = page.page.locator("#panel")
    assert panel.locator("h3").text_content() == "W1"
    gradient = fp.backprop(fp.models.chapter)(*chapter_example()).gradients["W1"]
    shown = panel.locator("div.of-gradient dd").nth(4).text_content()
    assert float(shown.replace("−", "-")) == pytest.approx(float(jnp.linalg.norm(gradient)), rel=1e-3)
    assert panel.locator(".histogram svg").count() == 2
    assert panel.locator("math").count() > 1
    # From a value to the operators that use it, and back.
    panel.locator(".links button", has_text="linear").first.click()
    assert panel.locator("h3").text_content().split()[-1] == "linear"


def test_zoom_and_pan(page: Opened) -> None:
    def view() -> list[float]:
        return [float(x) for x in page.page.locator("#canvas svg").first.get_attribute("viewBox").split()]

    start = view()
    page.page.click("#zoom-in")
    zoomed = view()
    assert zoomed[2] == pytest.approx(start[2] / 1.4)
    box = page.page.locator("#canvas").bounding_box()
    page.page.mouse.move(box["x"] + 30, box["y"] + 30)
    page.page.mouse.down()
    page.page.mouse.move(box["x"] + 130, box["y"] + 80, steps=4)
    page.page.mouse.up()
    panned = view()
    assert zoomed[0] - panned[0] == pytest.approx(100 * zoomed[2] / box["width"], rel=1e-3)
    assert zoomed[1] - panned[1] == pytest.approx(50 * zoomed[2] / box["width"], rel=1e-3)
    assert page.page.locator("#panel h3").count() == 0
    page.page.click("#zoom-fit")
    fitted, whole = view(), page.report.drawing.layout
    assert fitted[0] <= 0
    assert fitted[0] + fitted[2] >= whole.width
    # What a keyboard moves to is brought into view.
    for _ in range(8):
        page.page.keyboard.press("+")
    page.page.locator('#canvas [data-name="J"]').first.focus()
    x, _, width, _ = view()
    assert (
        x
        < float(page.page.evaluate("document.querySelector('#canvas [data-name=J] rect').x.baseVal.value"))
        + 30
        < x + width
    )


def test_repetitions_of_a_folded_block(browser: Browser, hostile: tuple[fp.Report, Path]) -> None:
    for page, report, _, _ in opened(browser, hostile):
        kernel = page.locator('#canvas [data-name$="Block_0/Dense_0/kernel"]')
        kernel.dispatch_event("click")
        assert page.locator("#panel select option").count() == 3
        page.locator("#panel select").select_option(index=2)
        assert page.locator("#panel h3").text_content().endswith("Block_2/Dense_0/kernel")
        value = report.inspection.quantities[page.locator("#panel h3").text_content()].value
        shown = page.locator("#panel div.of-value dd").nth(4).text_content()
        assert float(shown) == pytest.approx(value.norm, rel=1e-3)


# --- both sweeps ------------------------------------------------------------------------------


def lit(page: Page, sweep: str) -> list[str]:
    return page.locator(f"#canvas .lit-{sweep}").evaluate_all("nodes => nodes.map(n => n.dataset.name)")


def test_the_sweeps_step_by_step(page: Opened) -> None:
    operators = page.report.graph.operators
    for i, op in enumerate(operators, 1):
        page.page.click("#next")
        assert f"Forward {i} of {len(operators)} · {op.name}" in page.page.locator("#caption").text_content()
        assert op.name in lit(page.page, "forward")
        assert page.page.locator("#canvas .flow-forward").count() > 0
    assert not lit(page.page, "backward")
    gradients = fp.backprop(fp.models.chapter)(*chapter_example()).gradients
    back = [op.name for op in reversed(operators)]
    for i, name in enumerate(back, 1):
        page.page.click("#next")
        assert f"Backward {i} of {len(back)} · {name}" in page.page.locator("#caption").text_content()
        assert page.page.locator("#canvas .flow-backward").count() > 0
    assert set(gradients) <= set(lit(page.page, "backward"))
    page.page.click("#back")
    assert f"Backward {len(back) - 1}" in page.page.locator("#caption").text_content()
    page.page.click("#first")
    assert not lit(page.page, "forward") + lit(page.page, "backward")


def test_the_animation_runs_and_pauses(page: Opened) -> None:
    page.page.select_option("#speed", "16")
    page.page.click("#play")
    page.page.locator("#canvas .flow-forward path").first.wait_for()
    assert page.page.evaluate("document.getAnimations().some(a => a.animationName === 'flow')")
    page.page.locator("#caption", has_text="Backward 6 of 6").wait_for()
    assert page.page.locator("#play").text_content().strip() == "Play"
    page.page.select_option("#speed", "0.25")
    page.page.click("#play")
    page.page.locator("#caption", has_text="Forward 1 of 6").wait_for()
    assert page.page.locator("#play").get_attribute("aria-pressed") == "true"
    page.page.click("#play")
    page.page.wait_for_timeout(300)
    assert "Forward 1 of 6" in page.page.locator("#caption").text_content()
    page.page.locator("#position").fill("9")
    assert "Backward 3 of 6" in page.page.locator("#caption").text_content()


def test_who_wants_no_motion_gets_none(browser: Browser, chapter: tuple[fp.Report, Path]) -> None:
    for page, *_ in opened(browser, chapter, reduced_motion="reduce"):
        page.select_option("#speed", "16")
        page.click("#play")
        page.locator("#caption", has_text="Backward 6 of 6").wait_for()
        assert page.evaluate("document.getAnimations().length") == 0


# --- keyboard ---------------------------------------------------------------------------------


def focused(page: Page) -> str | None:
    return page.evaluate("document.activeElement.dataset.name ?? null")


def test_the_keyboard_reaches_and_opens_every_node(page: Opened) -> None:
    page.page.locator("nav a").last.focus()
    reached = []
    for node in page.report.drawing.picture.nodes:
        page.page.keyboard.press("Tab")
        reached.append(focused(page.page))
        outline = page.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid"
        page.page.keyboard.press("Enter")
        assert page.page.locator("#panel h3").count() == 1, node
        page.page.keyboard.press("Escape")
    assert reached == [node.name for node in page.report.drawing.picture.nodes]
    page.page.locator('#canvas [data-name="x"]').focus()
    for _ in range(20):
        page.page.keyboard.press("ArrowRight")
    assert focused(page.page) == "J"
    page.page.keyboard.press("ArrowLeft")
    assert focused(page.page) == page.report.graph.operators[-1].name
    for key, where in (("n", "Forward 1"), ("n", "Forward 2"), ("b", "Forward 1")):
        page.page.keyboard.press(key)
        assert where in page.page.locator("#caption").text_content()
    page.page.keyboard.press("p")
    assert page.page.locator("#play").get_attribute("aria-pressed") == "true"
    page.page.keyboard.press("p")
    assert page.page.locator("#play").get_attribute("aria-pressed") == "false"
    page.page.locator(".skip").focus()
    page.page.keyboard.press("Enter")
    assert page.page.evaluate("document.activeElement.id") == "after-graph"


# --- text -------------------------------------------------------------------------------------


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
    layers = [(jnp.full((6, 6), 0.1 * i), jnp.zeros(6)) for i in range(1, 9)]

    def loss(layers: Any, x: Any) -> Any:
        for w, b in layers:
            x = jnp.tanh(x @ w + b) * jnp.cos(x @ w) + jnp.sin(x)
        return jnp.sum(x**2)

    report = fp.report(loss, fold=True)(layers, jnp.ones((2, 6)))
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
