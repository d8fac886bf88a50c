"""Steps on disk: what is read is what was written, or the damage is named and the step before it is used."""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from funcprop.training import CheckpointError, Checkpoints


def placed(devices: int, *axes: str | None) -> NamedSharding:
    mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices], axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec(*axes))


def tree(step: int = 0, devices: int = 8) -> Any:
    """Arrays of all kinds: split, whole, in a few bits, keys, empty, with names that are alike."""
    w = jax.random.normal(jax.random.key(step), (64, 16))
    return {
        "w": jax.device_put(w, placed(devices, "data")),
        "whole": jax.device_put(w[0] + step, placed(devices)),
        "state": optax.adam(1e-3).init({"half": jnp.full(3, step, jnp.bfloat16)}),
        "keys": jax.random.split(jax.random.key(step), 3),
        "raw": jax.random.PRNGKey(step),
        "none": None,
        "empty": jnp.zeros((0, 4)),
        "a.b": jnp.float32(step),
        "a": {"b": jnp.int32(step)},
    }


def equal(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def written(directory: Path, *steps: int, keep: int = 3) -> None:
    with Checkpoints(directory, keep=keep).opened() as saved:
        for step in steps:
            saved.save(step, tree(step), {"step": step})
        saved.wait()


def read(directory: Path, like: Any = None) -> tuple[Any, list[str]]:
    said: list[str] = []
    with Checkpoints(directory).opened() as saved:
        return saved.restore(tree(99) if like is None else like, said.append), said


@pytest.mark.parametrize("devices", [8, 4, 1])
def test_what_is_read_is_what_was_written_on_any_number_of_devices(tmp_path: Path, devices: int) -> None:
    written(tmp_path, 1, 2)
    found, said = read(tmp_path, tree(99, devices))
    equal(found.tree, tree(2))
    assert said == []
    assert found.tree["w"].sharding.num_devices == devices
    assert found.manifest.note == {"step": 2}
    assert found.manifest.devices["mesh"] == {"data": 8}
    assert found.manifest.versions["jax"] == jax.__version__
    regions = [region for region, _ in found.manifest.leaves["w"]["shards"]]
    assert regions == [[[8 * i, 8 * i + 8], [0, 16]] for i in range(8)]


def test_arrays_may_be_given_away_while_they_are_written(tmp_path: Path) -> None:
    give_away = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    with Checkpoints(tmp_path).opened() as saved:
        x = jnp.arange(1e6)
        for step in range(1, 4):
            saved.save(step, {"x": x}, {})
            x = give_away(x) + jnp.arange(1e6) + 1
        saved.wait()
        found = saved.restore({"x": x})
    assert found is not None
    np.testing.assert_array_equal(found.tree["x"], np.arange(1e6))


def test_the_last_steps_are_kept(tmp_path: Path) -> None:
    written(tmp_path, *range(1, 6), keep=2)
    assert Checkpoints(tmp_path).steps() == [4, 5]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".funcprop", "4", "5"]


def test_nothing_to_read(tmp_path: Path) -> None:
    assert read(tmp_path / "new") == (None, [])
    assert Checkpoints(tmp_path / "absent").steps() == []


# --- damage -----------------------------------------------------------------------------------


def largest(step: Path) -> Path:
    files = [path for path in step.rglob("*") if path.is_file() and path.name != "manifest.json"]
    return max(files, key=lambda path: path.stat().st_size)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def unreadable(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "bit": (flip, "is damaged"),
    "half": (halve, "bytes"),
    "gone": (Path.unlink, "is missing"),
    "unreadable": (unreadable, "cannot be read: Is a directory"),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("which", ["largest", "manifest.json", "_METADATA", "manifest.ocdbt"])
def test_damage_is_named_and_the_step_before_it_is_used(tmp_path: Path, kind: str, which: str) -> None:
    written(tmp_path, 1, 2)
    path = largest(tmp_path / "2") if which == "largest" else tmp_path / "2" / which
    damage, message = DAMAGE[kind]
    damage(path)
    found, said = read(tmp_path)
    equal(found.tree, tree(1))
    if which == "manifest.json" and kind == "gone":
        return  # That is how a step looks that was never finished.
    (line,) = said
    assert str(path) in line
    assert message in line or "is damaged" in line
    assert line.endswith("; step 1 is used instead.")
    assert "\n" not in line
    # What was damaged is kept aside, and the step can be written again.
    assert (tmp_path / "2.damaged").is_dir()
    written(tmp_path, 2)
    equal(read(tmp_path)[0].tree, tree(2))


def test_every_bit_counts(tmp_path: Path) -> None:
    """Bits drawn at random from all files of a step."""
    written(tmp_path, 1)
    files = sorted(path for path in (tmp_path / "1").rglob("*") if path.is_file())
    rng = np.random.default_rng(0)
    for path in files:
        data = path.read_bytes()
        for at in rng.integers(len(data), size=3):
            changed = bytearray(data)
            changed[at] ^= 1 << int(rng.integers(8))
            path.write_bytes(changed)
            with pytest.raises(CheckpointError, match=r"no step in .* can be read: .*; choose another"):
                read(tmp_path)
        path.write_bytes(data)
    equal(read(tmp_path)[0].tree, tree(1))


def test_arrays_are_compared_with_those_that_were_saved(tmp_path: Path) -> None:
    """A fault between the devices and the disk: files and their checksums agree, the numbers are others."""
    written(tmp_path, 1, 2)
    path = tmp_path / "2" / "manifest.json"
    manifest = json.loads(path.read_text())["manifest"]
    manifest["leaves"]["w"]["shards"][3][1] ^= 1
    from funcprop.training.manifest import Manifest

    Manifest(**manifest).write(tmp_path / "2")
    found, said = read(tmp_path)
    equal(found.tree, tree(1))
    assert said == [
        f"checkpoints: {tmp_path}/2: the array w is not what was saved; step 1 is used instead.",
    ]


# --- what cannot be written -------------------------------------------------------------------


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_a_full_disk_is_one_line_and_the_last_step_is_kept(tmp_path: Path) -> None:
    written(tmp_path, 1)
    program = """
        import resource, signal, sys, jax.numpy as jnp
        from funcprop.training import CheckpointError, Checkpoints
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        with Checkpoints(sys.argv[1]).opened() as saved:
            saved.save(2, {"x": jnp.arange(1000000.0)}, {})
            try:
                saved.wait()
            except CheckpointError as error:
                print(error)
            saved.save(3, {"x": jnp.arange(3.0)}, {})  # There is room for a small one.
            saved.wait()
            print(saved.steps())
    """
    done = python(program, str(tmp_path))
    first, last = done.stdout.splitlines()
    assert first.startswith(f"checkpoints: step 2 could not be written to {tmp_path}/2: ")
    assert f": File too large ({tmp_path}/2.orbax" in first
    assert first.endswith("; step 1 is the last good one.")
    assert last == "[1, 3]"
    assert done.stderr == ""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to become another user")
def test_a_directory_or_file_that_this_user_may_not_use(tmp_path: Path) -> None:
    """Root may do everything, so another user tries."""
    program = """
        import os, sys, jax.numpy as jnp, orbax.checkpoint
        from funcprop.training import CheckpointError, Checkpoints
        jnp.zeros(3)
        os.setgroups([])
        os.setegid(65534)
        os.seteuid(65534)
        try:
            with Checkpoints(sys.argv[1]).opened() as saved:
                print(saved.restore({"x": jnp.zeros(3)}, print).manifest.step)
        except CheckpointError as error:
            print(error)
    """
    for directory in [tmp_path, *tmp_path.parents]:
        if directory.stat().st_uid == os.geteuid() and directory != Path("/"):
            directory.chmod(0o755)
    inside = tmp_path / "run"
    with Checkpoints(inside).opened() as saved:
        for step in (1, 2):
            saved.save(step, {"x": jnp.full(3, step, "float32")}, {})
        saved.wait()
    done = python(program, str(inside))
    refused = f"checkpoints: {inside}/.funcprop cannot be written: Permission denied"
    assert done.stdout == f"{refused}; choose another directory.\n"
    for path in [inside, *inside.rglob("*")]:
        os.chown(path, 65534, 65534)
    secret = largest(inside / "2")
    os.chown(secret, 0, 0)
    secret.chmod(0)
    done = python(program, str(inside))
    assert done.stdout.splitlines() == [
        f"checkpoints: {secret} cannot be read: Permission denied; step 1 is used instead.",
        "1",
    ]


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/run cannot be written: Not a directory; choose another"):
        read(tmp_path / "file" / "run")


def test_two_runs_do_not_write_into_one_directory(tmp_path: Path) -> None:
    with Checkpoints(tmp_path).opened(), pytest.raises(CheckpointError, match="another run writes into"):
        read(tmp_path)
    assert read(tmp_path) == (None, [])


def test_what_others_wrote_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "120").mkdir()
    with pytest.raises(CheckpointError, match="has a directory '120' that fit did not write"):
        read(tmp_path)
    assert (tmp_path / "120").exists()


# --- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"w": jnp.zeros((64, 8))},
            r"2 has float64\[64, 16\] w, this run has float64\[64, 8\]; go on",
        ),
        ({"raw": jnp.zeros(2)}, r"2 has uint32\[2\] raw, this run has float64\[2\]"),
        ({"new": jnp.zeros(2)}, r"2 has no new, this run has float64\[2\]"),
        ({"state": None}, r"2 has int32\[\] state.0.count, this run has no such array"),
    ],
)
def test_a_step_of_another_model(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    written(tmp_path, 2)
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, tree() | change)
    equal(read(tmp_path)[0].tree, tree(2))


def test_what_is_no_array_cannot_be_saved(tmp_path: Path) -> None:
    with (
        Checkpoints(tmp_path).opened() as saved,
        pytest.raises(TypeError, match="f is of type function; only"),
    ):
        saved.save(1, {"f": lambda x: x}, {})


@pytest.mark.parametrize("name", ["every", "keep"])
def test_numbers_of_steps(name: str) -> None:
    with pytest.raises(ValueError, match=f"Checkpoints: {name}=0; pass a number of steps, 1 or more"):
        Checkpoints("x", **{name: 0})


def test_orbax_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'funcprop\[train\]'"):
        read(tmp_path)
