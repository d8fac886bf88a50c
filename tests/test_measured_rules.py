"""`fp.rules.measured`: which rules win, kept in a file. No time is measured: seconds are given."""

from __future__ import annotations

import json
import threading

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcprop as fp
from funcprop.rules.measuring import measured_rules, measurements_file

X = jnp.sin(jnp.arange(2 * 12 * 12 * 4.0)).reshape(2, 12, 12, 4)
W = jnp.cos(jnp.arange(9 * 4 * 4.0)).reshape(3, 3, 4, 4) / 6


def pooled(w, x):
    y = jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jnp.sum(nn.max_pool(nn.relu(y), (2, 2), (2, 2)) ** 2)


def looped(w, x):
    return jnp.sum(jax.lax.scan(lambda h, x: (jnp.tanh(h @ w + x),) * 2, x[0], x)[1] ** 2)


LOOP = jnp.sin(jnp.arange(64.0)).reshape(8, 8), jnp.cos(jnp.arange(5 * 2 * 8.0)).reshape(5, 2, 8)


@pytest.fixture
def clock(monkeypatch):
    """Seconds of the programs in turn: `clock(f)` gives those of a program by its number and its text."""

    def install(seconds_of):
        def in_turn(programs, operands, repeats):
            row = [seconds_of(i, program.as_text()) for i, program in enumerate(programs)]
            return np.array([row] * 3)

        monkeypatch.setattr(measured_rules, "_in_turn", in_turn)

    return install


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("fun", "args"), [(pooled, (W, X)), (looped, LOOP)])
@pytest.mark.parametrize("objective", ["time", 0.9])
def test_what_wins_is_kept_and_its_gradient_is_right(fun, args, objective, clock, tmp_path):
    clock(lambda i, text: [1.0, 0.9, 0.4, 0.8][min(i, 3)])
    rules = fp.rules.measured(fun, objective=objective, file=tmp_path / "file.json")(*args)
    fired = [m.operator for m in fp.matches(fun, rules)(*args) if m.reason is None]
    assert fired
    assert rules.target is not None
    for gradient in (fp.grad(fun, rules=rules), jax.jit(fp.grad(fun, rules=rules))):
        np.testing.assert_allclose(gradient(*args), jax.grad(fun)(*args), rtol=1e-10, atol=1e-10)
    v = jnp.ones_like(args[0])
    hvp = lambda grad: jax.jit(lambda w: jax.jvp(lambda w: grad(w, args[1]), (w,), (v,))[1])(args[0])  # noqa: E731
    np.testing.assert_allclose(hvp(fp.grad(fun, rules=rules)), hvp(jax.grad(fun)), rtol=1e-9, atol=1e-9)
    assert repr(rules).splitlines()[0].startswith("RuleSet 'measured' on cpu")
    assert "of the time" in repr(rules)
    assert fired[0] in repr(rules).partition("#")[2]


def test_what_loses_is_autodiffs(clock, tmp_path):
    clock(lambda i, text: 1.0 if i == 0 else 2.0)
    rules = fp.rules.measured(pooled, file=tmp_path / "file.json")(W, X)
    assert [m for m in fp.matches(pooled, rules)(W, X) if m.reason is None] == []
    assert "autodiff as it is: no rule wins by more than its noise" in repr(rules)


def test_default_is_taken_where_it_is_better(clock, tmp_path):
    # In the whole function the second program is `default`'s; all others are slower.
    clock(lambda i, text: [1.0, 0.5, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9][i])
    rules = fp.rules.measured(pooled, file=tmp_path / "file.json")(W, X)
    assert "default as it is" in repr(rules)
    own = fp.rules.default.on("cpu")
    found, expected = ([m.reason for m in fp.matches(pooled, r)(W, X)] for r in (rules, own))
    assert found == expected


def test_bytes_are_those_of_the_compiled_programs(tmp_path):
    loss = lambda x: jnp.sum(jnp.tanh(nn.max_pool(x, (2, 2), (2, 2))))  # noqa: E731
    x = jax.ShapeDtypeStruct((8, 64, 64, 16), "float32")
    rules = fp.rules.measured(loss, objective="bytes", file=tmp_path / "file.json")(x)
    held = [
        jax.jit(fp.grad(loss, rules=r)).lower(x).compile().memory_analysis().temp_size_in_bytes
        for r in (rules, fp.rules.autodiff)
    ]
    assert held[0] < 0.5 * held[1]
    assert "of the bytes" in repr(rules)


def test_the_file_is_read_and_another_function_or_objective_is_not_in_it(clock, tmp_path):
    file = tmp_path / "deep" / "file.json"
    counted = []
    clock(lambda i, text: counted.append(i) or [1.0, 0.9, 0.5][min(i, 2)])
    first = fp.rules.measured(pooled, file=file)(W, X)
    measured_once = len(counted)
    again = fp.rules.measured(lambda w, x: pooled(w, x), file=file)(W, X)
    assert len(counted) == measured_once > 0, "the program is the key, not the python function"
    assert again == first
    assert hash(again) == hash(first)
    fp.rules.measured(pooled, objective=0.9, file=file)(W, X)
    assert len(counted) > measured_once
    before = len(counted)
    fp.rules.measured(pooled, file=file)(W, X[:1])
    assert len(counted) > before, "other shapes are measured"
    assert len(json.loads(file.read_text())["entries"]) == 3


@pytest.mark.sampled(2)
@pytest.mark.parametrize("content", ["{", "[]", '{"version": 1}', '{"version": 0, "entries": {}}', "\udcff"])
def test_a_damaged_file_is_ignored_with_a_warning_and_mended(content, clock, tmp_path):
    clock(lambda i, text: 1.0 if i == 0 else 0.5)
    file = tmp_path / "file.json"
    file.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.warns(UserWarning, match=r"file\.json .*ignored"):
        rules = fp.rules.measured(pooled, file=file)(W, X)
    assert fp.rules.measured(pooled, file=file)(W, X) == rules


def test_an_entry_that_this_version_does_not_know_is_measured_again(clock, tmp_path):
    clock(lambda i, text: 1.0 if i == 0 else 0.5)
    file = tmp_path / "file.json"
    rules = fp.rules.measured(pooled, file=file)(W, X)
    content = json.loads(file.read_text())
    for entry in content["entries"].values():
        for way in entry["ways"]:
            way["way"] = "of another version"
    file.write_text(json.dumps(content))
    assert fp.rules.measured(pooled, file=file)(W, X) == rules


def test_entries_that_are_added_at_once_are_all_there(tmp_path):
    file = tmp_path / "file.json"
    threads = [threading.Thread(target=measurements_file.add, args=(file, {str(i): i})) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert measurements_file.read(file) == {str(i): i for i in range(16)}
    assert [p.name for p in tmp_path.iterdir() if p.suffix not in (".json", ".lock")] == []


def test_the_default_file_is_in_the_cache_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert measurements_file.default_path() == tmp_path / "funcprop" / "measured.json"


ERRORS = {
    "objective": (
        {"objective": "speed"},
        ValueError,
        r"objective='speed'; pass 'time', 'bytes', or",
    ),
    "weight": ({"objective": 1.5}, ValueError, r"objective=1.5; .*weight of time from 0 to 1"),
    "repeats": ({"repeats": 0}, ValueError, r"repeats=0; every program has to run at least once"),
    "shapes": ({}, TypeError, r"an argument is a shape .*pass arrays, or objective='bytes'"),
}


@pytest.mark.parametrize(("options", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_what_cannot_be_measured(options, error, message, tmp_path):
    x = jax.ShapeDtypeStruct((3,), "float32")
    with pytest.raises(error, match=message):
        fp.rules.measured(jnp.sum, **options, file=tmp_path / "file.json")(x)
