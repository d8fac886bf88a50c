"""What a command is about: how it is named, and a clear message for every target that cannot be used."""

import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import module as module  # the fixture
from command import run, run_json

from funcprop.cli import main


@pytest.mark.parametrize(
    "example",
    [
        "(2.0, 3.0)",
        "{'w': 2.0, 'x': 3.0}",
        "((2.0,), {'x': 3.0})",
        "((2.0, 3.0), {})",
    ],
)
def test_example_may_be_a_tuple_a_dict_or_both(module: Any, example: str) -> None:
    name = module(f"""
        def f(w, x):
            return w * x
        def example():
            return {example}
        """)
    assert run_json("backward", f"{name}:f")["value"] == 6.0


def test_a_tuple_argument_is_not_taken_for_all_arguments(module: Any) -> None:
    name = module("""
        def f(pair, params):
            return pair[0] * pair[1] * params["w"]
        def example():
            return (2.0, 3.0), {"w": 4.0}
        """)
    assert run_json("backward", f"{name}:f")["value"] == 24.0


def test_target_without_arguments_in_a_file_or_a_class(module: Any, tmp_path: Path) -> None:
    name = module("""
        from neighbour import TWO
        class Models:
            @staticmethod
            def f():
                return jnp.sin(jnp.float32(TWO))
        """)
    (tmp_path / "neighbour.py").write_text("TWO = 2.0\n")
    expected = float(np.sin(np.float32(2)))
    values = run_json("forward", f"{tmp_path / name}.py:Models.f")["values"]
    np.testing.assert_allclose(values[-1]["entries"], expected, rtol=1e-6)


SOURCE = """
    PARAMS = {"w": 1.0}
    def example():
        return PARAMS, jnp.array([3.0, 4.0])
    def loss(params, x):
        return jnp.sum(params["w"] * x)
    def three(a, b, c):
        return a
    def vector(params, x):
        return params["w"] * x
    def branch(params, x):
        if params["w"] > 0:
            return params["w"]
    def broken(params, x):
        return helper(x)
    def helper(x):
        return jnp.dot(x, jnp.ones(3))
"""


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("los", r"has no 'los'; did you mean loss\?"),
        ("PARAMS", r"is of type dict, not a function; write module:function, file\.py:function, or"),
        ("three", r"do not fit three\(a, b, c\): missing a required argument: 'c'"),
        (
            "vector",
            r"TypeError: vector returns \(float64\[2\]\), but .*; return a mean or a sum, and .* \(has_aux\)",
        ),
        ("branch", r"line \d+, in branch\n.*params\[.w.\] > 0.*\n.*\njax\.TracerBoolConversionError"),
        ("broken", r"line \d+, in broken(.|\n)*line \d+, in helper(.|\n)*\nTypeError: dot_general requires"),
    ],
)
def test_errors_of_functions(module: Any, function: str, message: str) -> None:
    result = run("backward", f"{module(SOURCE)}:{function}")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert re.search(message, result.stderr), result.stderr
    assert "Traceback" not in result.stderr
    assert "funcprop/cli" not in result.stderr
    assert "internal frames" not in result.stderr


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "def f(x): return x",
            r"f\(x\) needs arguments \(missing a required argument: 'x'\).*no example\(\)",
        ),
        (
            "def f(x): return x\ndef example(): return jnp.ones(3)",
            r"example\(\) returned .* of shape \(3,\);",
        ),
        ("def f(x): return x\ndef example(): return 1 / 0", r"example\(\) failed:\n(.|\n)*ZeroDivisionError"),
        ("def f(x): return x\ndef example(): return {'y': 1.0}", "missing a required argument: 'x'"),
        ("import no_such_package", r"cannot import module(.|\n)*line 2, in <module>(.|\n)*no_such_package'"),
        ("def f(x: return x", r"cannot import module(.|\n)*SyntaxError"),
        ("raise SystemExit(3)", r"cannot import module(.|\n)*SystemExit: 3"),
    ],
)
def test_errors_of_modules(module: Any, source: str, message: str) -> None:
    result = run("backward", f"{module(source)}:f", "--json")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert re.search(message, result.stderr), result.stderr
    assert "importlib" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["forward", "chapterr"], "target 'chapterr' is incomplete; write module:function"),
        (["forward", __file__], f"is incomplete; write {__file__}:test_example"),
        (["forward", "no_such_module:f"], "cannot import module 'no_such_module' (from "),
        (["forward", "nowhere/model.py:f"], "nowhere/model.py; write module:function"),
        (["backward", "chapter", "--argnums", "first"], "--argnums 'first': write positions"),
        (["backward", "chapter", "--argnums", "7"], "argnums=7, but the function was called with 4"),
        (["train", "math:sqrt", "--hidden", "3"], "--hidden is for the built-in `chapter`"),
        (["train", "math:sqrt"], "target 'math:sqrt' needs x, but train calls a function of no arguments"),
        (["train", "time:time"], "returns an object of type float; return an `fp.training.Setup`"),
        (["train", "chapter", "--batch", "9999"], "batch=9999; choose one between 1 and the 1438"),
        (["train", "chapter", "--lr", "1e9"], "NonFiniteStepError: fit: the loss (inf) of step 31"),
        (["train", "chapter", "--data", "nowhere"], "DataError: nowhere/train-images-idx3-ubyte: no such"),
    ],
)
def test_errors_of_the_command_line(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 1
    assert message in result.stderr, result.stderr


def test_shapes_cannot_be_backpropagated_or_verified(module: Any) -> None:
    name = module("""
        def f(x):
            return jnp.sum(jnp.tanh(x))
        def example():
            return (jax.ShapeDtypeStruct((3,), "float32"),)
        """)
    assert "but backpropagation needs arrays" in run("backward", f"{name}:f").stderr
    said = run("curvature", f"{name}:f").stderr
    assert "but curvature needs arrays; `funcprop second` and `funcprop memory` take shapes." in said
    assert "--verify needs arrays" in run("derive", f"{name}:f", "--verify").stderr
    assert run("derive", f"{name}:f").exit_code == 0


@pytest.mark.parametrize("missing", ["rich", "typer"])
def test_missing_packages(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == f"funcprop: the command needs {missing!r}; pip install 'funcprop[cli]'"


COMMANDS = (
    *("forward", "backward", "derive", "draw", "compare", "report"),
    *("memory", "rematerialize", "second", "curvature", "tune"),
)
BROKEN = """
    number = 3
    def lonely(x):
        return x
    def value(x):
        if x > 0:
            return x
        return -x
    def example():
        return (jnp.array(1.0),)
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_what_is_wrong_with_a_target(command: str, module: Any) -> None:
    name = module(BROKEN)
    without = Path("without_example.py")
    without.write_text("def lonely(x):\n    return x\n")
    cases = {
        "nowhere.nothing:f": "cannot import module 'nowhere.nothing'",
        f"{name}:number": "is of type int, not a function",
        "without_example.py:lonely": "needs arguments (missing a required argument: 'x')",
        f"{name}:value": "if x > 0:",
    }
    for target, message in cases.items():
        result = run(command, target)
        assert result.exit_code == 1, target
        assert message in result.stderr, target
        assert not result.stdout
        frames = re.findall(r'File "(.*?)"', result.stderr)
        assert all("/funcprop/" not in frame and "site-packages" not in frame for frame in frames), frames


LOSS = """
    import optax
    def loss(w, x):
        return jnp.mean((x @ w) ** 2)
    def opaque(w, x):
        return object()
    def example():
        return jnp.ones(2), jnp.ones((3, 2))
    def setup():
        return fp.training.Setup(loss, jnp.ones(2), [(jnp.ones((3, 2)),)], optax.sgd(0.1), epochs=1)
    """


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["derive", "./:loss"], "./ is no .py file; write module:function"),
        (["derive", "notes.txt:loss"], "notes.txt is no .py file"),
        (["derive", "{}:opaque"], r"function opaque at .*users_\w+.py"),
        (["report", "{}:loss", "-o", "page.pdf"], "the page is .html"),
        (["rematerialize", "{}:loss", "--budget", "250%"], "write a share as 25%"),
        (["partition", "{}:loss", "--on", "v5e:2x2x2"], "v5e has 2 axes; write v5e:4x4"),
        (["partition", "{}:loss", "--on", "v5p:0x2x2"], "v5p has 3 axes; write v5p:4x4x4"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_a_remedy(module: Any, arguments: list[str], said: str) -> None:
    name = module(LOSS)
    Path("notes.txt").touch()
    result = run(*(argument.format(name) for argument in arguments))
    assert result.exit_code == 1
    assert re.search(said, result.stderr)
    assert "Traceback" not in result.stderr
    assert not Path("page.pdf").exists()


def test_a_run_that_cannot_go_on_says_that_it_begins_anew(module: Any) -> None:
    name = module(LOSS)
    first, second = (run("train", f"{name}:setup", "--resume", "saved") for _ in range(2))
    assert first.exit_code == second.exit_code == 0
    assert "there is no step in saved: the run begins anew" in first.stderr
    assert "goes on after step" in second.stderr
    assert "anew" not in second.stderr


def test_a_batch_without_examples_has_no_shares_of_a_trace(module: Any) -> None:
    name = module(LOSS.replace("jnp.ones((3, 2))\n    def setup", "jnp.ones((0, 2))\n    def setup"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run("curvature", f"{name}:loss").exit_code == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_result_that_cannot_be_printed_is_one_line(module: Any) -> None:
    name = module("def f():\n    return jnp.float32(1)")
    command = [sys.executable, "-m", "funcprop", "forward", f"{name}:f"]
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert result.returncode == 1
    assert (
        result.stderr
        == "funcprop: the result cannot be printed: No space left on device; write it elsewhere.\n"
    )
