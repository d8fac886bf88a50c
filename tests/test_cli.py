"""The command: its text, its JSON, and a clear message for every target that cannot be used."""

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from idx_files import write_split
from typer.testing import CliRunner, Result

import funcprop as fp
from funcprop.cli import main
from funcprop.cli.app import app
from funcprop.cli.target import chapter_example


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def run_json(*arguments: str) -> Any:
    """The one JSON object on stdout; `NaN` and `Infinity` as bare words are not JSON."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(result.stdout, parse_constant=refuse)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write a module into the current directory; its name is new for every test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    header = "import jax, jax.numpy as jnp, funcprop as fp\n"

    def write(source: str) -> str:
        name = f"users_{re.sub('[^a-z0-9]', '_', tmp_path.name)}"
        (tmp_path / f"{name}.py").write_text(header + textwrap.dedent(source))
        return name

    return write


# --- forward ----------------------------------------------------------------------------------


def test_forward_shows_graph_and_values() -> None:
    text = run("forward", "chapter").stdout
    assert str(fp.trace(fp.models.chapter)(*chapter_example())) in text
    values = [line.split()[0] for line in text.split("value ")[1].splitlines()[2:]]
    assert values == ["W1", "W2", "x", "y", "λ", "z", "h", "o", "L", "s", "J"]


def test_forward_json_has_every_number() -> None:
    data = run_json("forward", "chapter")
    params, x, y, λ = chapter_example()
    z = params["W1"] @ x
    values = {value["name"]: value for value in data["values"]}
    np.testing.assert_allclose(values["z"]["entries"], z)
    np.testing.assert_allclose(values["z"]["norm"], jnp.linalg.norm(z))
    np.testing.assert_allclose(values["J"]["entries"], fp.models.chapter(params, x, y, λ))
    assert [op["op"] for op in data["operators"]] == ["linear", "φ", "linear", "l", "l2_penalty", "add"]
    assert data["operators"][0]["inputs"] == ["W1", "x"]


def test_forward_of_shapes_has_no_values(module: Any) -> None:
    name = module("""
        def f(x):
            return jnp.tanh(x)
        def example():
            return (jax.ShapeDtypeStruct((2, 3), "float32"),)
        """)
    assert "so there are no values" in run("forward", f"{name}:f").stdout
    assert run_json("forward", f"{name}:f")["values"] is None


def test_forward_inside_a_loop_and_of_anything(module: Any) -> None:
    name = module("""
        def f(key, x):
            def step(c, x):
                c = fp.name(jnp.sinh(c + x), "c")
                return c, c * 1j
            empty, low = jnp.zeros((0,)), jnp.bfloat16(1.5) * x[0].astype("bfloat16")
            return jax.lax.scan(step, 0.0, x), key, empty, x > 1, low
        def example():
            return jax.random.key(0), jnp.array([1.0, 2.0, 1e9])
        """)
    values = {value["name"]: value for value in run_json("forward", f"{name}:f")["values"]}
    c = values["scan/c"]
    assert c["shape"] == [3]
    assert c["entries"][2] == "Infinity"
    assert c["norm"] == "Infinity"
    assert c["nonfinite"] == 1
    assert values["key"]["entries"] is None
    assert values["gt"]["entries"] == [False, True, True]
    assert {"real", "imag"} == set(values["scan/mul"]["entries"])
    assert "Infinity" in run("forward", f"{name}:f").stdout


def test_entries_option_leaves_out_large_arrays() -> None:
    values = {v["name"]: v for v in run_json("forward", "chapter", "--entries", "3")["values"]}
    assert values["z"]["entries"] is not None
    assert values["W1"]["entries"] is None
    assert "…" in run("forward", "chapter", "--entries", "3").stdout


# --- backward ---------------------------------------------------------------------------------

CHAPTER = """\
∂J/∂L = 1
∂J/∂s = 1
∂J/∂o = prod(∂J/∂L, ∂L/∂o) = ∂L/∂o
∂s/∂W1 = λ W1
∂s/∂W2 = λ W2
∂J/∂W2 = prod(∂J/∂o, ∂o/∂W2) + prod(∂J/∂s, ∂s/∂W2) = ∂J/∂o hᵀ + λ W2
  prod(∂J/∂o, ∂o/∂W2)
  prod(∂J/∂s, ∂s/∂W2)
∂J/∂h = prod(∂J/∂o, ∂o/∂h) = W2ᵀ ∂J/∂o
∂J/∂z = prod(∂J/∂h, ∂h/∂z) = ∂J/∂h ⊙ φ′(z)
∂J/∂W1 = prod(∂J/∂z, ∂z/∂W1) + prod(∂J/∂s, ∂s/∂W1) = ∂J/∂z xᵀ + λ W1
  prod(∂J/∂z, ∂z/∂W1)
  prod(∂J/∂s, ∂s/∂W1)
"""


def test_backward_is_the_chapters_list() -> None:
    text = run("backward", "chapter").stdout
    listed = re.findall(r"^(\s*[∂p].*?)\s{2,}", text, re.MULTILINE)
    assert listed == CHAPTER.splitlines()
    assert text.endswith("Everything is finite.\n")


def test_backward_json_has_shapes_norms_and_contributions() -> None:
    data = run_json("backward", "chapter")
    params, x, y, λ = chapter_example()
    p = fp.backprop(fp.models.chapter)(params, x, y, λ)
    found = {gradient["name"]: gradient for gradient in data["gradients"]}
    assert list(found) == [f"∂J/∂{v}" for v in "Lso"] + ["∂s/∂W1", "∂s/∂W2"] + [
        f"∂J/∂{v}" for v in ("W2", "h", "z", "W1")
    ]
    for name, gradient in p.gradients.items():
        np.testing.assert_allclose(found[f"∂J/∂{name}"]["entries"], gradient)
        np.testing.assert_allclose(found[f"∂J/∂{name}"]["norm"], jnp.linalg.norm(gradient))
        assert found[f"∂J/∂{name}"]["shape"] == list(gradient.shape)
    np.testing.assert_allclose(found["∂s/∂W1"]["entries"], λ * params["W1"])
    terms = {term["source"]: term for term in found["∂J/∂W1"]["contributions"]}
    assert list(terms) == ["z", "s"]
    np.testing.assert_allclose(terms["s"]["entries"], λ * params["W1"])
    assert data["first_nonfinite"] is None
    np.testing.assert_allclose(data["value"], p.value)


def test_backward_finds_the_first_nonfinite(module: Any) -> None:
    name = module("""
        def f(w):
            return fp.name(jnp.log(w - 1.0), "z")
        def example():
            return (1.0,)
        """)
    data = run_json("backward", f"{name}:f")
    assert data["value"] == "-Infinity"
    assert data["first_nonfinite"]["variable"] == "z"
    assert data["first_nonfinite"]["sweep"] == "forward"
    assert f"{name}.py" in data["first_nonfinite"]["source"]
    assert "First non-finite: forward sweep: value of z" in run("backward", f"{name}:f").stdout


def test_backward_of_chosen_arguments(module: Any) -> None:
    name = module("""
        def f(w, x, *, scale):
            return scale * jnp.sum(w * x)
        def example():
            return {"x": jnp.array([3.0]), "w": jnp.array([2.0]), "scale": 2.0}
        """)
    last = {
        n: run_json("backward", f"{name}:f", "--argnums", n)["gradients"] for n in ("0", "1", "0,1", "all")
    }
    names = {n: {g["name"] for g in found} for n, found in last.items()}
    assert {"∂J/∂w"} <= names["0"] - names["1"]
    assert {"∂J/∂x"} <= names["1"] - names["0"]
    assert {"∂J/∂w", "∂J/∂x"} <= names["0,1"] & names["all"]


# --- derive -----------------------------------------------------------------------------------


def test_derive_prints_text_latex_and_deviations() -> None:
    derivation = fp.derive(fp.models.chapter)(*chapter_example())
    assert run("derive", "chapter").stdout == derivation.text() + "\n"
    assert run("derive", "chapter", "--latex").stdout == derivation.latex() + "\n"
    verified = run("derive", "chapter", "--latex", "--verify").stdout
    assert verified.startswith(derivation.latex())
    comments = verified.removeprefix(derivation.latex()).split("\n")
    assert all(line.startswith("% ") or not line for line in comments)
    data = run_json("derive", "chapter", "--verify")
    assert [line["text"] for line in data["backward"]] == [line.text() for line in derivation.backward]
    assert data["latex"] == derivation.latex()
    assert set(data["deviations"]) == {line["name"] for line in data["forward"] + data["backward"]}
    assert max(data["deviations"].values()) < 1e-6


# --- targets ----------------------------------------------------------------------------------


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


def test_compare_lists_what_each_rule_saves(module: Any) -> None:
    name = module(
        """
        def loss(x, w):
            return jnp.sum(jnp.tanh(x @ w))

        def example():
            return jnp.ones((2, 3, 4)), jnp.ones((4, 8))
        """
    )
    text = run("compare", f"{name}:loss", "--argnums", "0,1", "--repeats", "1")
    assert text.exit_code == 0, text.stderr
    assert re.search(r"^dot_general +1 +[\d.]+ ", text.stdout, re.MULTILINE)
    data = run_json("compare", f"{name}:loss", "--rules", "handwritten", "--repeats", "1")
    assert [row["operator"] for row in data["rows"]] == ["dot_general", "tanh"]
    assert data["whole"]["rules_seconds"] > 0
    for option, message in (
        (("--rules", "best"), "--rules 'best' is not a rule set; choose one of default, handwritten."),
        (("--argnums", "all"), "--argnums all is not for `compare`"),
    ):
        failed = run("compare", f"{name}:loss", *option)
        assert failed.exit_code == 1
        assert message in failed.stderr


def test_json_stands_alone_on_stdout(module: Any) -> None:
    name = module("""
        print("imported")
        def f(w):
            print("traced")
            jax.debug.print("w = {}", w)
            return w**2
        def example():
            return (3.0,)
        """)
    result = run("backward", f"{name}:f", "--json")
    assert json.loads(result.stdout)["value"] == 9.0
    assert {"imported", "traced"} <= set(result.stderr.splitlines())


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
        ("vector", r"TypeError: vector returns \(float64\[2\]\), but gradients are of one real scalar"),
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
        (["forward", "no_such_module:f"], "cannot import module 'no_such_module' (from "),
        (["forward", "nowhere/model.py:f"], "nowhere/model.py; write module:function"),
        (["backward", "chapter", "--argnums", "first"], "--argnums 'first': write positions"),
        (["backward", "chapter", "--argnums", "7"], "argnums=7, but the function was called with 4"),
        (["train", "math:sqrt", "--hidden", "3"], "--hidden is for the built-in `chapter`"),
        (["train", "math:sqrt"], "target 'math:sqrt': sqrt() failed:\nTypeError"),
        (["train", "time:time"], "returns an object of type float; return an `fp.training.Setup`"),
        (["train", "chapter", "--batch", "9999"], "batch=9999; choose one between 1 and the 1438"),
        (["train", "chapter", "--lr", "1e9"], "FloatingPointError: fit: the mean loss of epoch 1 is"),
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
    assert "--verify needs arrays" in run("derive", f"{name}:f", "--verify").stderr
    assert run("derive", f"{name}:f").exit_code == 0


@pytest.mark.parametrize("missing", ["rich", "typer"])
def test_missing_packages(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == f"funcprop: the command needs {missing!r}; pip install 'funcprop[cli]'"


# --- train ------------------------------------------------------------------------------------

SETUP = """
    import optax
    def loss(w, x, y):
        return jnp.mean((x @ w - y) ** 2)
    def setup():
        x = jnp.arange(6.0).reshape(3, 2) / 5
        batches = [(x, x @ jnp.array([1.0, -1.0]))]
        return RETURNED
"""
FULL = (
    "fp.training.Setup(loss, jnp.zeros(2), batches, optax.sgd(0.3), 5, "
    "lambda w: {'norm': jnp.linalg.norm(w)})"
)


def test_train_of_a_users_setup(module: Any) -> None:
    name = module(SETUP.replace("RETURNED", FULL))
    text = run("train", f"{name}:setup").stdout
    assert re.match(r"epoch 1/5  loss \S+  norm \S+\n", text)
    assert re.search(r"^variable +shape +‖value‖ +‖gradient‖$", text, re.MULTILINE)
    data = run_json("train", f"{name}:setup", "--epochs", "7")
    losses = [epoch["loss"] for epoch in data["epochs"]]
    assert len(losses) == 7
    assert losses == sorted(losses, reverse=True)
    w = next(variable for variable in data["variables"] if variable["name"] == "w")
    np.testing.assert_allclose(w["value"]["norm"], data["epochs"][-1]["norm"])
    assert w["gradient"]["shape"] == [2]
    assert data["objective"] < losses[-1]


def test_setup_may_be_a_dict(module: Any) -> None:
    returned = "dict(loss=loss, params=jnp.zeros(2), batches=batches, optimizer=optax.sgd(0.3), epochs=2)"
    name = module(SETUP.replace("RETURNED", returned))
    assert len(run_json("train", f"{name}:setup")["epochs"]) == 2


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("dict(loss=loss, model=1)", "has unknown 'model'; its keys are loss, params"),
        ("dict(loss=loss)", "has no 'params', 'batches', 'optimizer'; its keys are loss, params"),
        (
            "fp.training.Setup(loss, jnp.zeros(3), batches, optax.sgd(0.3))",
            r"in loss(.|\n)*dot_general requires",
        ),
        (
            "fp.training.Setup(loss, jnp.zeros(2), [], optax.sgd(0.3))",
            r"batches=.* yielded nothing in epoch 1",
        ),
    ],
)
def test_errors_of_setup(module: Any, returned: str, message: str) -> None:
    result = run("train", f"{module(SETUP.replace('RETURNED', returned))}:setup")
    assert result.exit_code == 1
    assert re.search(message, result.stderr), result.stderr


def test_train_chapter_on_idx_files(tmp_path: Path) -> None:
    write_split(tmp_path, compressed=True)
    arguments = [
        "--data",
        str(tmp_path),
        "--epochs",
        "2",
        "--batch",
        "10",
        "--hidden",
        "7",
        "--decay",
        "0.01",
    ]
    data = run_json("train", "chapter", *arguments, "--lr", "0.1", "--seed", "3")
    shapes = {variable["name"]: variable["value"]["shape"] for variable in data["variables"]}
    assert shapes["W1"] == [7, 20]
    assert shapes["x"] == [10, 20]
    λ = next(variable for variable in data["variables"] if variable["name"] == "λ")
    np.testing.assert_allclose(λ["value"]["entries"], 0.01, rtol=1e-6)
    assert set(data["epochs"][1]) == {"epoch", "loss", "test_loss", "test_accuracy"}


def drain(terminal: int) -> Iterator[bytes]:
    """What is written to a terminal until its other end is closed, which Linux reports as an error."""
    with os.fdopen(terminal, "rb", buffering=0) as stream, contextlib.suppress(OSError):
        while chunk := stream.read(4096):
            yield chunk


def test_progress_bar_is_on_the_terminal_and_results_in_the_pipe(module: Any, tmp_path: Path) -> None:
    name = module(SETUP.replace("RETURNED", FULL))
    terminal, stderr = pty.openpty()
    command = [sys.executable, "-m", "funcprop.cli", "train", f"{name}:setup"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=tmp_path)
    os.close(stderr)
    shown = b"".join(drain(terminal))
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert b"5/5" in shown
    assert len(re.findall(r"^epoch \d/5  loss", stdout, re.MULTILINE)) == 5
    assert "\x1b" not in stdout


def test_train_chapter_reaches_96_percent_in_a_pipe() -> None:
    command = [sys.executable, "-W", "error", "-m", "funcprop.cli", "train", "chapter"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert result.stderr == ""
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", result.stdout)
    accuracies = re.findall(r"test_accuracy ([\d.]+) %", result.stdout)
    assert len(accuracies) == 30
    assert float(accuracies[-1]) >= 96
    rows = [line.split()[0] for line in result.stdout.split("‖gradient‖\n")[1].splitlines()[1:]]
    assert rows[:5] == ["W1", "W2", "x", "y", "λ"]
    assert [row for row in rows if row in "zhoLsJ"] == ["z", "h", "o", "L", "s", "J"]
