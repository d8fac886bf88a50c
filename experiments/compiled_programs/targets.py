"""The accelerators that programs can be compiled for here: `pip install 'funcprop[accelerators]'`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Any

# A TPU's topology by its name; a GPU by the description that XLA's compiler asks a device for.
TARGETS = ("v5e:2x2", "v6e:2x2", "v5p:2x2x1", "v4:2x2x1", "h100")

_H100 = """gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
 shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84929347584
 shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 minor: 0 }
 registers_per_core_limit: 65536 registers_per_block_limit: 65536 }
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 } runtime_version { major: 12 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3" """


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


def topology(target: str) -> Any:
    """The target's devices, which can be compiled for and not run on."""
    from jax.experimental import topologies

    if is_gpu(target):
        return topologies.get_topology_desc(platform="cuda", target_config=_H100, topology="1x1x1")
    return topologies.get_topology_desc(platform="tpu", topology_name=target)
