"""Accelerators that are not there, as compilers are told of them: to compile for, not to run on."""

from __future__ import annotations

from typing import Any

# What XLA's compiler asks a GPU for.
_H100 = """gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
 shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84929347584
 shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 minor: 0 }
 registers_per_core_limit: 65536 registers_per_block_limit: 65536 }
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 } runtime_version { major: 12 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3" """


def tpu_devices(topology: str) -> list[Any]:
    """The devices of a TPU topology such as `v5e:2x2`; needs `libtpu`."""
    from jax.experimental import topologies

    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)


def h100_devices(count: int) -> list[Any]:
    """So many H100; needs JAX's CUDA plugin."""
    from jax.experimental import topologies

    found = topologies.get_topology_desc(platform="cuda", target_config=_H100, topology=f"1x{count}x1")
    return list(found.devices)
