"""The machine that a program is compiled for, and every size that rules take from it.

Rules cut their work into chunks and blocks, and are left out where they cannot gain. What is a good size
follows from caches, cores and vectors of a CPU, or from the on-chip memory of an accelerator. All these
numbers are computed here, from a `Machine`; the factors are read off the measurements that each function
names.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from funcprop import _jax
from funcprop.rules.rule import PLATFORMS, RuleError, platform_named

_KIB, _MIB = 2**10, 2**20


@dataclass(frozen=True)
class Machine:
    """A machine as rules see it: what follows is for one device.

    Args:
        platform: `"cpu"`, `"gpu"` or `"tpu"`.
        name: what it is called, for people.
        cores: cores of a CPU, multiprocessors of a GPU, tensor cores of a TPU chip.
        caches: bytes of the memories on the chip, the nearest first: L1, L2 and L3 of one core of a CPU,
        shared
            memory of a multiprocessor and L2 of a GPU, vector memory (VMEM) of a TPU.
        vector: bytes of a vector register (of a GPU's warp of 32 floats).
        bandwidth: bytes a second from the main memory, None if that is not known.

    Raises:
        RuleError: the platform is unknown, or a size is not positive.

    Example:
        >>> import funcprop as fp
        >>> fp.Machine("tpu", "TPU v5e").platform
        'tpu'
    """

    platform: str
    name: str = ""
    cores: int = 1
    caches: tuple[int, ...] = ()
    vector: int = 64
    bandwidth: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "platform", platform_named(self.platform, "Machine: platform"))
        object.__setattr__(self, "caches", tuple(self.caches) or _TYPICAL[self.platform])
        for field, value in (("cores", self.cores), ("caches", min(self.caches)), ("vector", self.vector)):
            if value < 1:
                raise RuleError(f"Machine: {field}={getattr(self, field)!r}; sizes are at least 1.")

    @classmethod
    def of(cls, target: Any) -> Machine:
        """The machine of a platform's name, a device, a topology, or itself.

        Of a platform that this process has, it is the first device; of others a usual one (TPU v5e, H100).

        Raises:
            RuleError: it is none of these.
        """
        if isinstance(target, Machine):
            return target
        if isinstance(target, str):
            platform = platform_named(target, "target")
            if platform == "cpu":
                return host()
            devices = jax.devices() if jax.default_backend() == platform else []
            return _accelerator(platform, str(devices[0].device_kind) if devices else _USUAL[platform])
        device = next(iter(getattr(target, "devices", ())), target)
        if not (hasattr(device, "platform") and hasattr(device, "device_kind")):
            raise RuleError(
                f"target={target!r} is no machine; pass one of {', '.join(map(repr, PLATFORMS))}, a device, "
                "a topology or an fp.Machine."
            )
        platform = platform_named(device.platform, "target")
        return host() if platform == "cpu" else _accelerator(platform, str(device.device_kind))


@dataclass(frozen=True)
class CompileTarget:
    """What a program is compiled for: a platform as JAX names it, and the machine.

    `certain` unless the program is being written down for a platform that is known when it is lowered; then
    the platform is the one of JAX's default device.
    """

    platform: str
    machine: Machine
    certain: bool = True

    @classmethod
    def of(
        cls, machine: Machine | None, values: Sequence[Any] = (), staged_out: bool = False
    ) -> CompileTarget:
        """The target of a rule set that is resolved for a machine, or for programs of these arguments."""
        if machine is not None:
            return cls(machine.platform, machine)
        found = _jax.platform_of(values)
        platform = found or _jax.default_platform()
        return cls(platform, _machine_on(platform), found is not None or not staged_out)


@functools.cache
def _machine_on(platform: str) -> Machine:
    # A platform that no rule knows has no sizes either: only rules that cannot lose are used on it.
    return Machine.of(platform) if platform in PLATFORMS else host()


# Where nothing is known of a CPU; the rest as `_KINDS` has them.
_TYPICAL = {
    "cpu": (32 * _KIB, _MIB, 32 * _MIB),
    "gpu": (228 * _KIB, 50 * _MIB),
    "tpu": (128 * _MIB,),
}
_USUAL = {"gpu": "H100", "tpu": "TPU v5 lite"}

# By a part of `device_kind`, the first that fits: cores, on-chip memories, bandwidth. The vendors' data
# sheets.
_KINDS: dict[str, tuple[tuple[str, int, tuple[int, ...], float], ...]] = {
    "gpu": (
        ("A100", 108, (164 * _KIB, 40 * _MIB), 1.56e12),
        ("H200", 132, (228 * _KIB, 50 * _MIB), 4.8e12),
        ("H100", 132, (228 * _KIB, 50 * _MIB), 3.35e12),
        ("B200", 148, (228 * _KIB, 126 * _MIB), 8.0e12),
        ("V100", 80, (96 * _KIB, 6 * _MIB), 0.9e12),
        ("T4", 40, (64 * _KIB, 4 * _MIB), 0.3e12),
        ("MI300", 304, (64 * _KIB, 4 * _MIB), 5.3e12),
    ),
    "tpu": (
        ("v5 lite", 1, (128 * _MIB,), 0.82e12),
        ("v5e", 1, (128 * _MIB,), 0.82e12),
        ("v6", 1, (128 * _MIB,), 1.64e12),
        ("v5", 2, (128 * _MIB,), 2.77e12),
        ("v4", 2, (128 * _MIB,), 1.23e12),
        ("7x", 2, (64 * _MIB,), 7.4e12),
    ),
}


def _accelerator(platform: str, kind: str) -> Machine:
    for part, cores, caches, bandwidth in _KINDS[platform]:
        if part in kind:
            return Machine(platform, kind, cores, caches, 128 if platform == "gpu" else 4096, bandwidth)
    return Machine(platform, kind, caches=_TYPICAL[platform], vector=128 if platform == "gpu" else 4096)


@functools.cache
def host() -> Machine:
    """The CPU that this process runs on, as Linux describes it; a usual one elsewhere."""
    root = Path("/sys/devices/system/cpu/cpu0/cache")
    found: dict[int, int] = {}
    for index in sorted(root.glob("index*")):
        kind, level, size = (_read(index / name) for name in ("type", "level", "size"))
        if kind != "Instruction" and level.isdigit() and size[:-1].isdigit():
            found[int(level)] = int(size[:-1]) * {"K": _KIB, "M": _MIB}.get(size[-1], 1)
    caches = tuple(found[level] for level in sorted(found)) if {1, 2} <= set(found) else _TYPICAL["cpu"]
    cpu = dict(line.split(":", 1) for line in _read(Path("/proc/cpuinfo")).splitlines()[:40] if ":" in line)
    fields = {key.strip(): value.strip() for key, value in cpu.items()}
    flags = fields.get("flags", fields.get("Features", "")).split()
    vector = 64 if "avx512f" in flags else 32 if "avx" in flags else 16 if flags else 64
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine("cpu", fields.get("model name", "CPU"), cores, caches, vector)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # Not Linux, or a container without it: what is read above has a usual value.
        return ""


# --- sizes of a CPU ---------------------------------------------------------------------------


def _cpu(machine: Machine) -> Machine:
    return machine if machine.platform == "cpu" else host()


def _power_of_two(x: float) -> int:
    """The largest power of two that is not above `x`."""
    return 2 ** int(math.log2(max(x, 1)))


def near_cache(machine: Machine) -> int:
    """Bytes of the cache beside a core, L2 or 64 × L1 if that is more: what a chunk of patches takes.

    2 MiB on CPUs with 32 or 48 KiB of L1 and 1 or 2 MiB of L2, on which `patches` was measured.
    """
    l1, l2 = (*_cpu(machine).caches, *_TYPICAL["cpu"][1:])[:2]
    return _power_of_two(max(l2, 64 * l1))


def cached_entries(machine: Machine, itemsize: int = 4) -> int:
    """Entries of an array that the caches of a core's neighbourhood do not hold: 8 × the near one."""
    return 8 * near_cache(machine) // itemsize


def lanes(machine: Machine, itemsize: int = 4) -> int:
    """Entries of a vector register."""
    return max(1, _cpu(machine).vector // itemsize)
