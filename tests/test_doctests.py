"""Every example in the docstring of a public name runs and prints what it says."""

import doctest
import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import jax
import pytest

import funcprop as fp
import funcprop.testing  # `import funcprop` alone does not import the checker

PUBLIC = (
    *(fp, fp.curvature, fp.layers, fp.memory, fp.models, fp.rules, fp.training),
    funcprop.testing,
)
EXAMPLES = doctest.DocTestParser()


def public_names() -> Iterator[tuple[str, Any]]:
    """All public names, and the methods of public classes."""
    for module in PUBLIC:
        for name in dir(module):
            value = getattr(module, name)
            if isinstance(value, ModuleType):
                continue
            full = f"{module.__name__}.{name}"
            yield full, value
            if inspect.isclass(value):
                # With what it inherits, which may stand in a class that is not public.
                own = {k: v for base in value.__mro__[::-1] if _ours(base) for k, v in vars(base).items()}
                yield from ((f"{full}.{k}", v) for k, v in own.items() if k[0] != "_" and callable(v))


def _ours(kind: type) -> bool:
    return kind.__module__.startswith("funcprop.")


def owner(name: str) -> Any:
    """The class or module in which a public name is."""
    return dict(public_names()).get(name.rpartition(".")[0])


def with_examples() -> list[Any]:
    found, seen = [], []
    for name, value in public_names():
        if any(value is other for other in seen):
            continue
        seen.append(value)
        test = EXAMPLES.get_doctest(inspect.getdoc(value) or "", {}, name, name, 0)
        if test.examples:
            found.append(pytest.param(test, id=name))
    return found


@pytest.mark.parametrize("test", with_examples())
def test_example(test: doctest.DocTest) -> None:
    report: list[str] = []
    # The examples are written for JAX's default precision, the tests run in double precision.
    with jax.enable_x64(False):
        result = doctest.DocTestRunner(verbose=False).run(test, out=report.append)
    assert result.failed == 0, "".join(report)


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, value in public_names()
        if isinstance(value, fp.Layer) or (inspect.isfunction(value) and not inspect.isclass(owner(name)))
    ],
)
def test_every_public_function_has_an_example(name: str) -> None:
    assert ">>> " in (inspect.getdoc(dict(public_names())[name]) or "")
