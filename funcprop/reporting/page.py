"""The page: templates filled in, everything from the function escaped.

Text is escaped by jinja2 or by the modules that make SVG and MathML; what the script needs is one JSON object
without angle brackets. The script is allowed by its hash and nothing else is, and nothing can be loaded.
"""

from __future__ import annotations

import base64
import hashlib
from importlib import resources

import jax
import jinja2
from markupsafe import Markup

from funcprop.drawing.draw import Drawing
from funcprop.drawing.rows import NARROW, ROW
from funcprop.drawing.svg import svg
from funcprop.graph.graph import bytes_text
from funcprop.reporting.contents import DETAILS, contents
from funcprop.reporting.equations import equations
from funcprop.reporting.number_text import amount, count, digits
from funcprop.reporting.report_data import ReportData

# A page that would be larger has fewer numbers of values that nobody named.
MOST_BYTES = 2_000_000

_ASSETS = resources.files("funcprop.reporting") / "assets"
_STYLES = ("page.css", "charts.css", "viewer.css")
_SCRIPTS = ("page.js", "panel.js", "viewer.js", "player.js")


def render(report: ReportData) -> str:
    """The page of a report."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (_ASSETS / name).read_text("utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"bytes": bytes_text, "digits": digits, "count": count, "amount": amount}
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    script = "(() => {\n" + "\n".join(map(_asset, _SCRIPTS)) + "\n})();"
    drawings = [picture.drawing for picture in report.pictures]
    pictures, narrow = (Markup("\n".join(_svg(each, width) for each in drawings)) for width in (ROW, NARROW))
    for detail in DETAILS:
        written = equations(report, detail.lines)
        fill = environment.get_template("page.html").render
        page = fill(
            report=report,
            graph=report.graph,
            picture=report.drawing.picture,
            svg=pictures,
            narrow=narrow,
            equations=written,
            data=contents(report, written, detail),
            notes=[*report.collapsed, *([detail.said] if detail.said else [])],
            style=Markup("\n".join(map(_asset, _STYLES))),
            script=Markup(script),
            digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            backend=jax.default_backend(),
            jax_version=jax.__version__,
        )
        # A name can have half of a surrogate pair, which no encoding of text has.
        encoded = page.encode("utf-8", "replace")
        if len(encoded) < MOST_BYTES:
            break
    return encoded.decode("utf-8")


def _svg(drawing: Drawing, width: float) -> str:
    """A picture without the rules for dark pages: this page has its own, for all pictures."""
    return svg(drawing.picture, drawing.in_rows_of(width), drawing.types, "light")


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text("utf-8")
