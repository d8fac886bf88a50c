"""Data flows one way: no module of the library imports, by way of others, itself."""

import ast
import graphlib
from pathlib import Path

import funcprop

ROOT = Path(funcprop.__file__).parent
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


def test_imports_have_no_circle() -> None:
    paths = {
        ".".join(("funcprop", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in ROOT.rglob("*.py")
    }
    graph = {name: with_packages(imported(path, set(paths)), name) for name, path in paths.items()}
    for importer, imports in ASKED_FOR:
        graph[importer].remove(imports)
    order = list(graphlib.TopologicalSorter(graph).static_order())  # CycleError names a circle
    assert order.index("funcprop.patterns") < order.index("funcprop.rewrite") < order.index("funcprop.layers")
