"""A report saved and opened in headless Chromium."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

import funcprop as fp

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Opened(NamedTuple):
    """A page in the browser, with everything that it said or asked for."""

    page: Page
    report: fp.Report
    complaints: list[str]
    requests: list[str]


def launched() -> Iterator[Browser]:
    """The browser, until it is no longer needed. Without one tests are skipped, or fail if it is required."""
    if CHROMIUM is None:
        reason = "there is no Chromium; `apt-get install chromium` brings one"
        if os.environ.get("FUNCPROP_BROWSER") == "required":
            pytest.fail(reason)
        pytest.skip(reason)
    # As root, which continuous integration often is, Chromium runs only without its sandbox.
    options: Any = {"executable_path": CHROMIUM, "args": ["--no-sandbox"]}
    with sync_playwright() as playwright, playwright.chromium.launch(**options) as browser:
        yield browser


def saved(report: fp.Report, directory: pytest.TempPathFactory) -> Path:
    path = directory.mktemp("report") / "page.html"
    report.save(path)
    return path


def opened(browser: Browser, made: tuple[fp.Report, Path], **options: Any) -> Iterator[Opened]:
    report, path = made
    complaints: list[str] = []
    requests: list[str] = []
    with browser.new_context(**options) as context:
        page = context.new_page()
        page.set_default_timeout(5000)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        yield Opened(page, report, complaints, requests)
        assert not complaints
        assert requests == [path.as_uri()]


_CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    const shape = element.closest("text")?.parentNode.querySelector(":scope > rect, :scope > ellipse");
    if (shape && rgba(getComputedStyle(shape).fill)[3] > 0) return rgba(getComputedStyle(shape).fill);
    for (let e = element; e; e = e.parentElement) {
      const colour = rgba(getComputedStyle(e).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255, 255];
  };
  const found = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = texts.nextNode(); node; node = texts.nextNode()) {
    const element = node.parentElement;
    if (!node.data.trim() || element.closest("script, style, svg [aria-hidden]")) continue;
    if (!element.checkVisibility()) continue;
    const style = getComputedStyle(element);
    const a = luminance(rgba(element.closest("text") ? style.fill : style.color));
    const b = luminance(behind(element));
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), node.data.trim().slice(0, 40)]);
  }
  return found;
}"""


def contrasts(page: Page) -> list[tuple[float, str]]:
    """The ratio of contrast of every text that is shown, as WCAG 2 defines it, and how the text begins."""
    return page.evaluate(_CONTRASTS)
