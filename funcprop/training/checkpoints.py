"""Steps of a run on disk: written while training goes on, verified when they are read.

A directory has one subdirectory for every step that is kept, written by orbax. A step is finished when its
manifest is there; whatever has none was interrupted, is ignored, and is removed by the next run. What there
is to go on from is always read from the directory itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from funcprop.partition.edges import shared_out, taken_back
from funcprop.training.manifest import (
    MANIFEST,
    CheckpointError,
    DamagedError,
    Manifest,
    file_checksums,
    leaf_facts,
    versions,
)
from funcprop.training.peers import Peers
from funcprop.training.quiet_orbax import cause, quiet
from funcprop.training.saved_arrays import as_saved, in_structure, named_arrays, require_same

DAMAGED, REPLACED = ".damaged", ".removed"
MARK = ".funcprop"  # Where it is, unfinished steps are ours; a run holds a lock on it.


class Restored(NamedTuple):
    """A step that was read: the arrays, in the structure and places that were asked for, and the manifest."""

    tree: Any
    manifest: Manifest


class Checkpoints:
    """Where `fit` saves its steps, and how often.

    Args:
        directory: is made if it is not there. With several processes, one that all of them see.
        every: save after every so manyth step; None for the end of every epoch alone. The end of an epoch and
            of the run are saved in any case.
        keep: how many of the last steps are kept.

    Raises:
        ValueError: `every` or `keep` is less than 1.

    Example:
        >>> import tempfile, jax.numpy as jnp, funcprop as fp
        >>> directory = tempfile.mkdtemp()
        >>> with fp.training.Checkpoints(directory).opened() as saved:
        ...     saved.save(3, {"w": jnp.arange(2.0)}, {"why": "an example"})
        ...     saved.wait()
        ...     found = saved.restore({"w": jnp.zeros(2)})
        >>> print(found.tree["w"], found.manifest.step, found.manifest.note)
        [0. 1.] 3 {'why': 'an example'}
    """

    def __init__(self, directory: str | os.PathLike[str], *, every: int | None = None, keep: int = 3) -> None:
        for name, value in (("every", every), ("keep", keep)):
            if value is not None and value < 1:
                raise ValueError(f"Checkpoints: {name}={value}; pass a number of steps, 1 or more.")
        self.directory = Path(directory).absolute()
        self.every, self.keep = every, keep
        self._writer: Any = None
        self._peers: Any = None
        self._thread: threading.Thread | None = None
        self._finished: int | None = None
        self._error: BaseException | None = None

    def steps(self) -> list[int]:
        """Return the finished steps, in their order; read from the directory."""
        names = os.listdir(self.directory) if self.directory.is_dir() else []
        found = [int(name) for name in names if name.isdecimal()]
        return sorted(step for step in found if (self._path(step) / MANIFEST).exists())

    @contextlib.contextmanager
    def opened(self, peers: Peers | None = None) -> Iterator[Checkpoints]:
        """Open the directory for this run alone, and finish what is being written at the end.

        Args:
            peers: the processes of this run, if there are several.

        Raises:
            CheckpointError: it cannot be written to, or another run does.
            ModuleNotFoundError: orbax is not installed.
        """
        try:
            import orbax.checkpoint as ocp
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"Checkpoints: {error.name!r} is not installed; pip install 'funcprop[train]'",
                name=error.name,
            ) from error
        self._peers = Peers() if peers is None else peers
        with self._owned(), quiet():
            handler = ocp.PyTreeCheckpointHandler()
            self._writer = ocp.AsyncCheckpointer(handler, timeout_secs=600)
            try:
                yield self
            finally:
                with contextlib.suppress(CheckpointError):  # It was for `wait` to raise.
                    self.wait()
                self._writer.close()
                self._writer = None

    @contextlib.contextmanager
    def _owned(self) -> Iterator[None]:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if self._peers.mine:
                yield
                return
            import fcntl  # Not on every system.

            mark = self.directory / MARK
            others = [] if mark.exists() else [p.name for p in self.directory.iterdir() if p.name.isdecimal()]
            if others:
                raise CheckpointError(
                    f"checkpoints: {self.directory} has a directory {others[0]!r} that fit did not write; "
                    "choose another directory."
                )
            with mark.open("a") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise CheckpointError(
                        f"checkpoints: another run writes into {self.directory}; stop it, or choose another "
                        "directory."
                    ) from None
                self._remove_unfinished()
                yield
        except OSError as error:
            if error.filename is None or not str(error.filename).startswith(str(self.directory)):
                raise
            raise CheckpointError(
                f"checkpoints: {error.filename} cannot be written: {error.strerror}; choose another "
                "directory."
            ) from None

    def _remove_unfinished(self) -> None:
        for path in self.directory.iterdir():
            step, _, rest = path.name.partition(".")
            unfinished = rest.startswith("orbax-checkpoint-tmp") or path.name.endswith(REPLACED)
            if step.isdecimal() and (unfinished or (not rest and not (path / MANIFEST).exists())):
                shutil.rmtree(path)

    # --- writing ------------------------------------------------------------------------------

    def save(self, step: int, tree: Any, note: dict[str, Any]) -> None:
        """Begin to write a step; the arrays may be given away as soon as this returns.

        Args:
            step: its number.
            tree: a pytree of arrays.
            note: plain data, which is written as JSON.

        Raises:
            CheckpointError: the step before it, or this one, cannot be written.
        """
        self.wait()
        arrays = named_arrays(jax.tree.map(shared_out, tree))
        leaves = {name: leaf_facts(array) for name, array in arrays.items()}
        mesh = next((a.sharding.mesh for a in arrays.values() if hasattr(a.sharding, "mesh")), None)
        devices = {
            "platform": jax.default_backend(),
            "count": jax.device_count(),
            "processes": jax.process_count(),
            "mesh": None if mesh is None else dict(mesh.shape),
        }
        for other in map(json.loads, self._peers.gathered("leaves", json.dumps(leaves))[1:]):
            for name, leaf in other.items():
                leaves[name]["shards"] += leaf["shards"] if self._peers.mine == 0 else []
        begun = Manifest(step, note, versions(), devices, leaves, {})
        with self._told(step):
            self._set_aside(step, REPLACED)
            self._writer.save(self._path(step), {name: a for name, a in arrays.items() if a.size})
        self._thread = threading.Thread(target=self._finish, args=(begun,), name="finish_checkpoint")
        self._thread.start()

    def _finish(self, begun: Manifest) -> None:
        """Write the manifest when the arrays are written, and remove the oldest steps; in a thread."""
        try:
            with self._told(begun.step):
                self._writer.wait_until_finished()
                if self._peers.mine == 0:
                    path = self._path(begun.step)
                    begun._replace(files=file_checksums(path)).write(path)
                    for step in self.steps()[: -self.keep]:
                        self._set_aside(step, REPLACED)
            self._finished = begun.step
        except CheckpointError as error:
            self._error = error

    @contextlib.contextmanager
    def _told(self, step: int) -> Iterator[None]:
        """Turn whatever keeps a step from being written into one line."""
        try:
            yield
        except Exception as error:  # orbax hands on what its many threads run into.
            last = self.steps()
            kept = f"step {last[-1]} is the last good one" if last else "no step has been saved yet"
            raise CheckpointError(
                f"checkpoints: step {step} could not be written to {self._path(step)}: {cause(error)}; "
                f"{kept}."
            ) from error

    def wait(self) -> None:
        """Wait until what is being written is finished.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def finished(self) -> int | None:
        """Return the step that was finished since the last time this was asked; None if none was."""
        found, self._finished = self._finished, None
        return found

    # --- reading ------------------------------------------------------------------------------

    def restore(self, like: Any, warn: Callable[[str], None] | None = None) -> Restored | None:
        """Read the last step that is whole; None if the directory has none.

        A step that is damaged is set aside, and the one before it is read.

        Args:
            like: a pytree of the same structure, shapes and dtypes, whose arrays lie where those that are
                read shall lie; on any number of devices.
            warn: is told in one line about each step that is damaged.

        Raises:
            CheckpointError: every step is damaged, or was saved by another model or optimizer.
        """
        problem = None
        steps = json.loads(self._peers.gathered("steps", json.dumps(self.steps()))[0])
        spread = jax.tree.map(shared_out, like) if steps else like
        for step in reversed(steps):
            path = self._path(step)
            try:
                found, mine = self._read(path, spread), ""
            except DamagedError as error:
                found, mine = None, str(error)
            # What one process cannot read, none shall use.
            problems = [text for text in self._peers.gathered("problem", mine) if text]
            if found is not None and not problems:
                return found._replace(tree=jax.tree.map(taken_back, found.tree, like))
            problem = problems[0]
            earlier = [s for s in steps if s < step]
            if warn is not None:
                used = f"step {earlier[-1]} is used instead" if earlier else "there is no step before it"
                warn(f"checkpoints: {problem}; {used}.")
            if earlier:
                self._set_aside(step, DAMAGED)
        if problem is not None:
            raise CheckpointError(
                f"checkpoints: no step in {self.directory} can be read: {problem}; choose another directory "
                "to begin anew."
            )
        return None

    def _read(self, path: Path, like: Any) -> Restored:
        import orbax.checkpoint as ocp

        manifest = Manifest.read(path)
        wanted = as_saved(manifest, named_arrays(like))
        require_same(path, manifest, wanted)
        manifest.verify_files(path)
        restored = {name: array for name, array in wanted.items() if array.size}
        how = {
            name: ocp.ArrayRestoreArgs(sharding=array.sharding, dtype=array.dtype)
            if array.committed
            else ocp.RestoreArgs(restore_type=np.ndarray, dtype=array.dtype)
            for name, array in restored.items()
        }
        try:
            found = self._writer.restore(path, args=ocp.args.PyTreeRestore(item=restored, restore_args=how))
        except Exception as error:
            raise DamagedError(f"{path} cannot be read: {cause(error)}") from error
        arrays = wanted | {name: jnp.asarray(array) for name, array in found.items()}
        manifest.verify_leaves(path, arrays)
        return Restored(in_structure(like, arrays), manifest)

    def _path(self, step: int) -> Path:
        return self.directory / str(step)

    def _set_aside(self, step: int, suffix: str) -> None:
        """Rename a step, which is one act; what is replaced is then removed."""
        path = self._path(step)
        aside = path.with_name(path.name + suffix)
        if self._peers.mine == 0 and path.exists():
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            if suffix == REPLACED:
                shutil.rmtree(aside)
