"""`fp.report`: what the page says, against NumPy; what it must not say; that no name becomes markup."""

from __future__ import annotations

import importlib
import json
import re
import time
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chapter_report import chapter_report

import funcprop as fp
from funcprop.cli.target import chapter_example
from funcprop.reporting.curves import train
from funcprop.reporting.inspection import inspect
from funcprop.reporting.loop_contents import opened
from funcprop.reporting.statistics import statistics

HOSTILE = "</script><img src=x onerror=alert(1)>"


def loss(params: Any, x: Any) -> Any:
    return fp.name(jnp.sum((x @ params[HOSTILE]) ** 2), "J")


@pytest.fixture(scope="module")
def hostile() -> fp.Report:
    return fp.report(loss, title=HOSTILE)({HOSTILE: jnp.ones((2, 3))}, jnp.array([[0.123456789, 7.0]]))


@pytest.fixture(scope="module")
def chapter() -> fp.Report:
    return chapter_report()


class Elements(HTMLParser):
    """Tags with their attributes, and the text of every kind of element."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self.tags[-1][0] if self.tags else "", []).append(data)


def data_of(report: fp.Report) -> Any:
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', report.html, re.DOTALL)
    return json.loads(found[0])


# --- numbers ----------------------------------------------------------------------------------


def test_statistics_are_numpys(chapter: fp.Report) -> None:
    p = fp.backprop(fp.models.chapter)(*chapter_example())
    variables = {v["name"]: v for v in data_of(chapter)["variables"]}
    assert set(variables) == {"W1", "W2", "x", "y", "λ", *p.values}
    for name, array in {**p.values, **chapter_example()[0]}.items():
        for kind, a in (
            ("value", np.asarray(array)),
            ("gradient", np.asarray(p.gradients[name]) if name != "J" else None),
        ):
            if a is None:
                continue
            found = variables[name][kind]
            expected = [a.min(), a.max(), a.mean(), a.std(), np.sqrt((a * a).sum()), (a == 0).mean()]
            np.testing.assert_allclose(found[:6], expected, rtol=1e-4, atol=1e-12)
            assert found[6:8] == [0, a.size]
            if a.size > 1:
                low, high, counts = found[8]
                np.testing.assert_allclose([low, high], [a.min(), a.max()], rtol=1e-4)
                assert counts == np.histogram(a, len(counts))[0].tolist()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([np.nan, np.inf, 1.0, 3.0], {"minimum": 1.0, "maximum": 3.0, "mean": 2.0, "nonfinite": 2}),
        ([1e200, -1e200], {"norm": np.sqrt(2) * 1e200, "std": 1e200, "mean": 0.0}),
        ([1e-200, 1e-200], {"norm": np.sqrt(2) * 1e-200, "std": 0.0}),
        ([1.0, 1.0 + 2e-16], {"minimum": 1.0, "nonfinite": 0}),
        ([0.0, 0.0, 5.0], {"zeros": 2 / 3}),
        ([np.nan], {"minimum": None, "nonfinite": 1, "histogram": None}),
        ([], {"minimum": None, "norm": 0.0, "size": 0}),
        ([3 + 4j, 0], {"maximum": 5.0, "norm": 5.0}),
        ([True, False], {"mean": 0.5}),
    ],
)
def test_statistics_of_unusual_arrays(values: list[Any], expected: dict[str, Any]) -> None:
    found = statistics(jnp.array(values))
    assert found is not None
    for name, value in expected.items():
        if isinstance(value, float):
            np.testing.assert_allclose(getattr(found, name), value, rtol=1e-12, atol=0)
        else:
            assert getattr(found, name) == value
    if found.histogram is not None:
        assert sum(found.histogram.counts) == found.size - found.nonfinite
    assert statistics(jax.random.key(0)) is None


def test_steps_are_the_two_sweeps(chapter: fp.Report) -> None:
    p = fp.backprop(fp.models.chapter)(*chapter_example())
    data = data_of(chapter)
    names = [v["name"] for v in data["variables"]]
    assert [names[i] for op in data["operators"] for i in op["out"]] == list(p.values)
    completed = [names[i] for _, _, completes in data["backward"] for i in completes]
    assert sorted(completed) == sorted(p.gradients)
    # `∂J/∂s` and the two parts of `∂J/∂W1` are seen in the steps in which they arise.
    adds = [(data["operators"][op]["op"], {names[i] for i in a}) for op, a, _ in data["backward"]]
    assert adds[0] == ("add", {"L", "s"})
    assert adds[1] == ("l2_penalty", {"W1", "W2"})


def test_a_cotangent_is_complete_though_others_read_the_value_before() -> None:
    """Those that send nothing back, a maximum behind `stop_gradient` for example."""

    def fun(w: Any) -> Any:
        z = fp.name(jnp.sin(w), "z")
        largest = jax.lax.stop_gradient(jnp.max(z))
        return jnp.sum(z * largest)

    derivation = fp.derive(fun, detail="operators")(jnp.ones(3))
    steps = inspect(derivation, None, opened(derivation.traced.graph, 0), examples=False).backward
    completed = [name for step in steps for name in step.completes]
    assert completed == list(fp.backprop(fun)(jnp.ones(3)).gradients)


def test_operators_and_their_cost(chapter: fp.Report) -> None:
    assert sum(kind.flops for kind in chapter.kinds) == chapter.graph.flops
    assert sum(kind.count for kind in chapter.kinds) == len(chapter.graph)
    # W1 x and W2 h; backwards two outer products and W2ᵀ ∂J/∂o.
    assert chapter.cost["value"].predicted.products == 2
    assert chapter.cost["gradient"].predicted.products == 5
    assert chapter.parameters == 3 * 4 + 2 * 3


def test_values_in_a_loop_are_in_the_node_of_the_loop() -> None:
    def looped(w: Any, xs: Any) -> Any:
        return jax.lax.scan(lambda c, x: (fp.name(c * w + x, "c"), None), 0.0, xs)[0]

    data = data_of(fp.report(looped)(0.5, jnp.arange(4.0)))
    (scan,) = [op for op in data["operators"] if op["op"] == "scan"]
    (inside,) = [
        data["variables"][i] for i in scan["inside"] if data["variables"][i]["name"] == "scan[body]/c"
    ]
    c = np.array([0.0, 1.0, 2.5, 4.25])
    np.testing.assert_allclose(inside["value"][:3], [c.min(), c.max(), c.mean()], rtol=1e-4)
    np.testing.assert_allclose(inside["gradient"][:2], [0.125, 1.0], rtol=1e-4)


def test_a_training_run_that_blows_up_is_shown() -> None:
    diverging = fp.training.Setup(lambda w: jnp.exp(w**2), jnp.array(2.0), [()], optax.sgd(1e3), epochs=5)
    page = fp.report(jnp.square, setup=diverging)(3.0)
    assert page.curves is not None
    assert page.curves.epochs == 1
    assert "is not finite" in str(page.curves.stopped)
    assert "is not finite" in page.html


def test_a_metric_that_only_some_epochs_have_stands_at_its_epochs(chapter: fp.Report) -> None:
    epochs = iter(range(1, 4))

    def evaluate(_: Any) -> dict[str, float]:
        epoch = next(epochs)
        return {"accuracy": epoch / 4} if epoch > 1 else {}

    setup = fp.training.Setup(
        lambda w: w**2, jnp.array(1.0), [()], optax.sgd(0.1), epochs=3, evaluate=evaluate
    )
    curves = train(setup, 3, 60.0)
    np.testing.assert_array_equal(curves.metrics["accuracy"], [np.nan, 0.5, 0.75])
    points = [p.split(",") for p in curves.charts[1].lines[0].points.split()]
    assert [float(x) for x, _ in points] == [50, 100]
    cells = re.findall("<td>([^<]*)</td>", replace(chapter, curves=curves).html)
    assert {"nan", "0.5", "0.75"} <= set(cells)


def test_curves_are_those_of_the_run(chapter: fp.Report) -> None:
    assert chapter.curves is not None
    w = 0.0
    for found in chapter.curves.metrics["loss"]:
        np.testing.assert_allclose(found, (w - 1) ** 2, rtol=1e-12)
        w -= 0.2 * (w - 1)
    (chart,) = chapter.curves.charts
    heights = [100 - float(point.split(",")[1]) for point in chart.lines[0].points.split()]
    labels = [float(tick.label) for tick in chart.ticks]
    shown = [labels[0] + h / 100 * (labels[-1] - labels[0]) for h in heights]
    np.testing.assert_allclose(shown, chapter.curves.metrics["loss"], atol=1e-3)


# --- what the page is -------------------------------------------------------------------------


def test_nothing_of_the_users_is_markup(hostile: fp.Report) -> None:
    elements = Elements(hostile.html)
    tags = [tag for tag, _ in elements.tags]
    assert "img" not in tags
    assert tags.count("script") == 2
    assert not any(name.startswith("on") for _, attributes in elements.tags for name in attributes)
    for kind in ("title", "h1", "button", "mi", "script"):
        assert any("onerror=alert(1)" in text for text in elements.texts[kind]), kind
    (variable,) = [v["name"] for v in data_of(hostile)["variables"] if v["kind"] == "parameter"]
    assert variable == HOSTILE


def test_the_page_loads_nothing(chapter: fp.Report) -> None:
    elements = Elements(chapter.html)
    for tag, attributes in elements.tags:
        for name in ("src", "href", "action", "srcset", "data"):
            assert (attributes.get(name) or "#").startswith(("#", "data:,")), (tag, attributes)
    assert "url(" not in chapter.html
    assert "@import" not in chapter.html
    assert set(re.findall(r"https?://[^\s\"'<)]+", chapter.html)) <= {"http://www.w3.org/2000/svg"}


def test_data_are_on_the_page_only_if_it_is_asked_for() -> None:
    x = jnp.array([[0.1234567, 7.0, -2.0, 0.5]])
    params = {HOSTILE: jnp.ones((4, 3))}
    without = fp.report(loss)(params, x)
    (seen,) = [v for v in data_of(without)["variables"] if v["name"] == "x"]
    assert "entries" not in seen
    assert seen["value"][8] is None
    assert "0.1235" not in without.html
    given = fp.report(loss, examples=True)(params, x)
    (seen,) = [v for v in data_of(given)["variables"] if v["name"] == "x"]
    assert "0.1235" in seen["entries"]
    assert sum(seen["value"][8][2]) == 4
    (weights,) = [v for v in data_of(given)["variables"] if v["name"] == HOSTILE]
    assert "entries" not in weights


def test_shapes_have_no_values_but_everything_else() -> None:
    page = fp.report(loss)(
        {HOSTILE: jax.ShapeDtypeStruct((2, 3), "float32")}, jax.ShapeDtypeStruct((5, 2), "float32")
    )
    assert page.value is None
    assert "The arguments were shapes" in page.html
    data = data_of(page)
    assert data["backward"]
    assert all(v["value"] is None for v in data["variables"])


def test_what_is_not_finite_is_said() -> None:
    page = fp.report(lambda w: jnp.sum(jnp.log(w)))(jnp.array([1.0, -1.0]))
    assert "value of log is not finite" in str(page.nonfinite)
    assert "First number that is not finite: forward sweep: value of log" in page.html


def blocks(count: int) -> fp.Report:
    def deep(weights: Any, x: Any) -> Any:
        for i, w in enumerate(weights):
            with jax.named_scope(f"a_block_with_a_long_name_{i}"):
                x = x + jnp.tanh(x @ w)
        return jnp.sum(x)

    return fp.report(deep)([jnp.ones((30, 30))] * count, jnp.linspace(0, 1, 60).reshape(2, 30))


@pytest.fixture(scope="module")
def three_blocks() -> fp.Report:
    return blocks(3)


def size_without_equations(page: fp.Report) -> int:
    """The size of a page without the equations for people, of which there are at most a hundred lines."""
    start, end = page.html.index('<section id="equations"'), page.html.index("<summary>Operator by operator")
    return len(page.html) - (end - start)


@pytest.mark.nightly
def test_repeated_blocks_are_drawn_once_and_add_little_but_their_numbers(three_blocks: fp.Report) -> None:
    small, large = three_blocks, blocks(4)
    data = data_of(large)
    members = [m for node in data["nodes"] if node["kind"] == "operator" for m in node["members"]]
    assert sorted(members) == list(range(len(large.graph)))
    written = {key for v in data["variables"] for key in v["equations"]}
    ids = {a["id"] for _, a in Elements(large.html).tags if "id" in a}
    assert {f"eq-{key}" for key in written} <= ids
    added = len(large.graph) - len(small.graph)
    # A thousand operators in folded blocks are to fit into 2 MB.
    assert 0 < size_without_equations(large) - size_without_equations(small) < 1500 * added
    assert len(large.drawing.picture.nodes) == len(small.drawing.picture.nodes)


def unlike(w: Any, x: Any) -> Any:
    """3,001 operators without scopes, in an order that never repeats."""
    chosen = np.random.default_rng(0).integers(0, 4, 3000)
    values = [w, x]
    for i in chosen:
        y, z = values[-1], values[-2]
        values.append((jnp.sin, jnp.cos, jnp.tanh, lambda y, z=z: y * z)[i](y))
    return jnp.sum(values[-1])


@pytest.mark.nightly
def test_three_thousand_operators_that_do_not_fold_stay_below_two_megabytes(
    chapter: fp.Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What XLA takes for programs of this size is not the page's.
    module = importlib.import_module("funcprop.reporting.report")
    monkeypatch.setattr(module, "second_order_cost", lambda *_, **__: lambda *_, **__: chapter.cost)
    monkeypatch.setattr(module, "memory", lambda *_: chapter.memory)
    monkeypatch.setattr(module, "top", lambda *_: None)
    start = time.process_time()
    page = fp.report(unlike)(jnp.ones(8), jnp.linspace(0, 1, 8))
    size = len(page.html.encode())
    # It takes some 10 seconds of a quiet core.
    assert time.process_time() - start < 100
    assert len(page.graph) == 3001
    assert 500_000 < size < 2_000_000
    nodes = page.drawing.picture.nodes
    assert len(nodes) <= 400
    data = data_of(page)
    first = data["nodes"][: data["pictures"][1]["first"]]
    members = [m for node in first if node["kind"] != "variable" for m in node["members"]]
    assert sorted(members) == list(range(3001))
    assert len(data["nodes"]) <= 300
    # Nothing is left out without a word.
    assert "Grey boxes are modules, or operators together" in page.html
    assert re.search("no (histograms|statistics) of values that nobody named", page.html) or any(
        v["value"][8] is not None for v in data["variables"] if v["kind"] == "intermediate"
    )
    written = sum(len(v["equations"]) for v in data["variables"])
    assert f"{len(page.derivation.forward) + len(page.derivation.backward) - written:,} lines" in page.html


def test_in_a_notebook_it_is_a_frame(hostile: fp.Report) -> None:
    ((tag, attributes),) = Elements(hostile._repr_html_()).tags
    assert tag == "iframe"
    assert attributes["srcdoc"] == hostile.html
    assert attributes["sandbox"] == "allow-scripts"


# --- memory -----------------------------------------------------------------------------------


def test_bars_of_memory_add_up_to_the_ledger(three_blocks: fp.Report) -> None:
    memory = three_blocks.memory
    assert memory.unit == "layer"
    for i, ledger in enumerate(memory.footprint.ledgers.values()):
        bars = [layer.bars[i] for layer in memory.layers]
        assert sum(bar.nbytes for bar in bars) == sum(row.nbytes for row in ledger.rows)
        by_category = {category: sums[i] for category, sums in memory.categories}
        assert sum(by_category.values()) == sum(row.nbytes for row in ledger.rows)
        assert by_category["parameters"] == ledger.by("category")["parameters"]
    names = [layer.name for layer in memory.layers if layer.name.startswith("a_block")]
    assert names == [f"a_block_with_a_long_name_{i}" for i in range(3)]
    inference, training = memory.layers[0].bars
    assert inference.nbytes < training.nbytes


def test_memory_of_a_training_step_has_the_optimizers_state(chapter: fp.Report) -> None:
    adam = fp.training.Setup(
        lambda w, x: jnp.sum((w - x) ** 2), jnp.zeros(100), [(jnp.ones(100),)], optax.adam(0.1)
    )
    memory = fp.report(lambda w, x: jnp.sum((w - x) ** 2), setup=adam, epochs=1)(
        jnp.zeros(100), jnp.ones(100)
    ).memory
    sums = dict(memory.categories)
    assert sums["optimizer state"][0] == 0
    assert sums["optimizer state"][1] >= 2 * 800
    assert memory.unit == "value"
