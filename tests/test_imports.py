"""Data flows one way: no module imports itself by way of others, nor what the README lists below it."""

import ast
import graphlib
import inspect
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import funcprop

ROOT = Path(funcprop.__file__).parent
README = Path(__file__).parents[1] / "README.md"


@cache
def parsed(path: Path) -> list[ast.AST]:
    """Every node of a file."""
    return list(ast.walk(ast.parse(path.read_text("utf-8"))))


def imported(path: Path, modules: set[str]) -> set[str]:
    """The modules of the library that a file imports, wherever in the file, also for annotations alone."""
    found = set()
    for node in parsed(path):
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
    return {name: with_packages(imported(path, set(paths)), name) for name, path in paths.items()}


def test_imports_have_no_circle(graph: dict[str, set[str]]) -> None:
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names a circle


def test_the_readme_lists_every_room_after_those_that_it_imports(graph: dict[str, set[str]]) -> None:
    section = README.read_text("utf-8").partition("## Find your way in the code\n")[2].partition("\n## ")[0]
    rows = [
        re.findall(r"`(\w+)`", row.split("|")[1]) for row in re.findall(r"^\| `.*$", section, re.MULTILINE)
    ]
    place = {room: row for row, rooms in enumerate(rows) for room in rooms}
    outside = {"funcprop", "funcprop.__main__"}
    inside = {name: names - {"funcprop"} for name, names in graph.items() if name not in outside}
    assert set(place) == {name.split(".")[1] for name in inside}
    backwards = [
        (importer, name)
        for importer, names in inside.items()
        for name in names
        if place[name.split(".")[1]] > place[importer.split(".")[1]]
    ]
    assert backwards == []


# Modules that JAX does not promise to keep, and what else stands on its own objects for its own use.
SEMI_PUBLIC = re.compile(r"jax\.(_src|core|extend|interpreters|lib)\b|jaxlib\b|.*\._src\b")
PUBLIC = re.compile(r"jax\.core(\.Tracer)?|jaxlib(\.__version__)?")
OF_EQUATIONS = {"ctx", "debug_info", "name_stack", "source_info"}


def dotted(node: ast.AST) -> Iterator[tuple[int, str]]:
    """What a piece of code imports or reads by a dotted name, with its line."""
    if isinstance(node, ast.Import):
        yield from ((node.lineno, alias.name) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
    elif isinstance(node, ast.Attribute):
        yield node.lineno, ast.unparse(node)


def test_one_room_alone_knows_what_jax_does_not_promise() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in ROOT.rglob("*.py")
        if path.parent.name != "_jax"
        for node in parsed(path)
        for line, name in dotted(node)
        if (SEMI_PUBLIC.match(name) and not PUBLIC.fullmatch(name)) or name.rpartition(".")[2] in OF_EQUATIONS
    ]
    assert found == []


def test_functions_do_not_shadow_modules(graph: dict[str, set[str]]) -> None:
    rooms = [
        funcprop,
        *(vars(funcprop)[name] for name in dir(funcprop) if inspect.ismodule(getattr(funcprop, name))),
    ]
    shadowed = [
        f"{room.__name__}.{name}"
        for room in rooms
        for name in dir(room)
        if f"{room.__name__}.{name}" in graph
    ]
    assert shadowed == [room.__name__ for room in rooms[1:]]


def test_names_are_public() -> None:
    assert sorted([*dir(funcprop), "__version__"]) == sorted(funcprop.__all__)
    assert not [name for name in dir(funcprop) if name.startswith("_")]
    modules = {name for name in dir(funcprop) if inspect.ismodule(getattr(funcprop, name))}
    assert modules == {"curvature", "layers", "memory", "models", "partition", "rules", "testing", "training"}


@pytest.mark.parametrize(
    ("room", "name", "hint"),
    [
        (funcprop, "hesian", "did you mean funcprop.hessian"),
        (
            funcprop.rules,
            "handwriten",
            "no 'handwriten'; did you mean funcprop.rules.handwritten",
        ),
        (funcprop, "laplace", "did you mean funcprop.curvature.laplace"),
        (funcprop, "laplac", "did you mean funcprop.curvature.laplace"),
        (funcprop.memory, "hessian", "did you mean funcprop.hessian"),
        (funcprop.memory, "xyz", r"dir\(funcprop.memory\) lists its names"),
    ],
)
def test_a_misspelled_name_is_said(room, name, hint) -> None:
    with pytest.raises(AttributeError, match=hint):
        getattr(room, name)
    assert not hasattr(room, "__wrapped__")


def test_importing_loads_nothing_else() -> None:
    heavy = "jax", "scipy", "matplotlib", "optax"
    program = f"import sys, funcprop; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_no_class_has_the_name_of_another() -> None:
    classes = [
        node.name for path in ROOT.rglob("*.py") for node in parsed(path) if isinstance(node, ast.ClassDef)
    ]
    assert [name for name, count in Counter(classes).items() if count > 1] == []
