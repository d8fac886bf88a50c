"""The accelerators that programs can be compiled for here: `pip install 'funcprop[accelerators]'`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Any

from funcprop._jax.topologies import h100_devices, tpu_devices

# TPUs are called by their topology.
TARGETS = ("v5e:2x2", "v6e:2x2", "v5p:2x2x1", "v4:2x2x1", "h100")


def is_gpu(target: str) -> bool:
    return target == "h100"


def environment(target: str) -> dict[str, str]:
    """What must stand in the environment of a process before it imports JAX."""
    found = {"JAX_PLATFORMS": "cpu"}
    if not is_gpu(target):
        found |= {
            "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_ID": "0",
            "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }  # fmt: skip
    return found


def missing(target: str) -> str | None:
    """What must be installed to compile for a target; None if it is there."""
    package = "jax_cuda12_plugin" if is_gpu(target) else "libtpu"
    if importlib.util.find_spec(package) is not None:
        return None
    return f"{target}: {package} is not installed; pip install 'funcprop[accelerators]'"


def versions(target: str) -> str:
    """The compiler and its version."""
    package = "jax-cuda12-plugin" if is_gpu(target) else "libtpu"
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return package


def device_of(target: str) -> Any:
    """A device of the target, which can be compiled for and not run on."""
    return h100_devices(1)[0] if is_gpu(target) else tpu_devices(target)[0]
