"""The report in headless Chromium: every node opens, both sweeps run, the keyboard works, nothing is hidden.

Without Chromium these tests are skipped; where the environment has FUNCPROP_BROWSER=required they fail.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import pytest
from chromium import Opened, opened
from playwright.sync_api import Browser, Page
from report_pages import browser as browser
from report_pages import chapter as chapter
from report_pages import hostile as hostile
from report_pages import loop as loop

import funcprop as fp
from funcprop.cli.target import chapter_example


@pytest.fixture(params=["chapter", "hostile"])
def either(request: pytest.FixtureRequest, browser: Browser) -> Iterator[Opened]:
    yield from opened(browser, request.getfixturevalue(request.param))


@pytest.fixture
def page(browser: Browser, chapter: tuple[fp.Report, Path]) -> Iterator[Opened]:
    yield from opened(browser, chapter, reduced_motion="no-preference")


# --- nodes ------------------------------------------------------------------------------------


@pytest.mark.sampled(1)
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
