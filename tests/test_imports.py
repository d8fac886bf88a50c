"""Data flows one way: no module imports itself by way of others, nor what the README lists below it."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

import funcprop

ROOT = Path(funcprop.__file__).parent
README = Path(__file__).parents[1] / "README.md"
# A notebook asks a graph for its picture: only when it does, the graph asks the room that draws.
ASKED_FOR = {
    ("funcprop.graph", "funcprop.drawing"),
    ("funcprop.drawing.difference", "funcprop.drawing.draw"),
}


def imported(path: Path, modules: set[str]) -> set[str]:
    """The modules of the library that a file imports, wherever in the file, but for its annotations alone."""
    found = set()
    tree = ast.parse(path.read_text("utf-8"))
    for_annotations = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in for_annotations:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [
                name if (name := f"{node.module}.{alias.name}") in modules else str(node.module)
                for alias in node.names
            ]
        else:
            continue
        found.update(name for name in names if name in modules)
    return found


def with_packages(names: set[str], importer: str) -> set[str]:
    """The modules, and the packages that Python runs before them, if the importer is outside of these."""
    around = {".".join(name.split(".")[:i]) for name in names for i in range(2, name.count(".") + 1)}
    return names | {package for package in around if not importer.startswith(package)}


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    """Every module of the library, and those that it imports."""
    paths = {
        ".".join(("funcprop", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in ROOT.rglob("*.py")
    }
    graph = {name: with_packages(imported(path, set(paths)), name) for name, path in paths.items()}
    for importer, asked in ASKED_FOR:
        graph[importer].remove(asked)
    return graph


def test_imports_have_no_circle(graph: dict[str, set[str]]) -> None:
    order = list(graphlib.TopologicalSorter(graph).static_order())  # CycleError names a circle
    assert order.index("funcprop.patterns") < order.index("funcprop.rewrite") < order.index("funcprop.layers")


def test_the_readme_lists_every_room_after_those_that_it_imports(graph: dict[str, set[str]]) -> None:
    section = README.read_text("utf-8").partition("## Find your way in the code\n")[2].partition("\n## ")[0]
    rows = [
        re.findall(r"`(\w+)`", row.split("|")[1]) for row in re.findall(r"^\| `.*$", section, re.MULTILINE)
    ]
    place = {room: row for row, rooms in enumerate(rows) for room in rooms}
    inside = {name: names - {"funcprop"} for name, names in graph.items() if name != "funcprop"}
    assert set(place) == {name.split(".")[1] for name in inside}
    backwards = [
        (importer, name)
        for importer, names in inside.items()
        for name in names
        if place[name.split(".")[1]] > place[importer.split(".")[1]]
    ]
    assert backwards == []
