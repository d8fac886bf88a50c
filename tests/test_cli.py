"""The command: its text and its JSON."""

import json
import re
import subprocess
import sys
from typing import Any

import jax.numpy as jnp
import numpy as np
from command import module as module  # the fixture
from command import run, run_json

import funcprop as fp
from funcprop.cli.target import chapter_example

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
    assert text.endswith("Value and gradients are finite.\n")


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
    data = run_json("compare", f"{name}:loss", "--rules", "handwritten", "--repeats", "1", "--argnums", "all")
    assert [row["operator"] for row in data["rows"]] == ["dot_general", "tanh"]
    assert data["whole"]["rules_seconds"] > 0
    for option, message in (
        (("--rules", "best"), "--rules 'best' is not a rule set; choose one of default, handwritten."),
        (("--argnums", "2"), "argnums=2, but the function was called with 2 positional arguments"),
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


def test_the_package_runs_as_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "funcprop", "--help"], capture_output=True, text=True)
    assert done.stderr == ""
    assert "Usage: python -m funcprop" in done.stdout
