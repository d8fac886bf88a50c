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
from funcprop.program.dtypes import product_dtype, single_at_least
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


# --- sizes ------------------------------------------------------------------------------------


def _power_of_two(x: float) -> int:
    """The largest power of two that is not above `x`."""
    return int(2 ** int(math.log2(max(x, 1))))


def near_cache(machine: Machine) -> int:
    """Bytes of what is near one core: L2, or 64 × L1 if that is more; of an accelerator 1/64 of its chip's.

    2 MiB on CPUs with 32 or 48 KiB of L1 and 1 or 2 MiB of L2, for which the factors below were measured; 2
    MiB of a TPU's 128 and 512 KiB of an H100's 50.
    """
    if machine.platform != "cpu":
        return _power_of_two(machine.caches[-1] / 64)
    l1, l2 = (*machine.caches, *_TYPICAL["cpu"][1:])[:2]
    return _power_of_two(max(l2, 64 * l1))


def lanes(machine: Machine, itemsize: int = 4) -> int:
    """Entries of a vector register: 16 numbers of 4 bytes with AVX-512."""
    return max(1, machine.vector // itemsize)


def cached_entries(machine: Machine, itemsize: int = 4) -> int:
    """Entries that stay in the caches between two passes (`log_softmax`): 8 × the near cache, 2²²."""
    return 8 * near_cache(machine) // itemsize


def least_pooled(machine: Machine, moved: bool) -> int:
    """Entries from which a pool with overlapping windows gains: 2¹⁵, 2¹⁸ where its axes are moved."""
    return near_cache(machine) // (8 if moved else 64)


def least_summed(machine: Machine) -> int:
    """Results from which a sum over overlapping windows gains (`average_pooling`): 4096."""
    return near_cache(machine) // 512


def dtype_of_factors(machine: Machine, *arrays: Any) -> Any:
    """The dtype of what is multiplied: 16 bits stay so where matrix units take them, with sums of 32 bits.

    A CPU would widen them in any case, and what is made in between (softmax weights) is then not rounded.
    """
    return single_at_least(*arrays) if machine.platform == "cpu" else product_dtype(*arrays)


def attention_blocks(queries: int, keys: int, machine: Machine, heads: int = 1) -> tuple[int, int]:
    """The default block of queries × keys of attention's logits.

    On a CPU an eighth of each length, in multiples of 8, but not more than half of the near cache holds (512)
    and not less than a quarter of that: below, the loop costs more than the products. Above an eighth, a
    block is felt in the bytes.

    On a TPU a step of the loop costs some thousand cycles whatever it does, so a block is as large as a
    quarter of the vector memory holds of all `heads` (and examples): v5e, T 2048, 4 heads of 64: 0.70 of
    autodiff's cycles by 1024 × 1024, 0.88 by 512 × 512, 1.68 by 256 × 256; 32 heads of 128, 16 bits: 0.98,
    0.67, 0.84. On a GPU 512 × 512, a block of one head in the near memory.
    """
    if machine.platform == "cpu":
        most = _power_of_two(math.sqrt(near_cache(machine) / 8))
        rows, cols = (min(max(_power_of_two(n / 8 + 1e-9), most // 4), most) for n in (queries, keys))
    elif machine.platform == "tpu":
        rows = cols = max(_power_of_two(math.sqrt(machine.caches[-1] / 16 / max(heads, 1))), 128)
    else:
        rows = cols = _power_of_two(math.sqrt(near_cache(machine) / 2))

    def equal(length: int, wanted: int) -> int:
        """A length is cut into equal blocks, so that little of the last is computed twice."""
        count = max(-(-length // wanted), 1)
        return max(min((-(-length // count) + 7) // 8 * 8, length), 1)

    return equal(queries, rows if queries else 1), equal(keys, cols if keys else 1)


def least_logits(machine: Machine) -> int:
    """Logits of a head from which attention goes block by block: 2¹⁶."""
    return near_cache(machine) // 32


def least_loss_logits(machine: Machine) -> int:
    """Logits from which a cross-entropy goes by chunks of tokens: 2²⁵; fewer stay in the cache."""
    return 64 * near_cache(machine) // 4


def costs_traffic(logits: int, machine: Machine) -> bool:
    """Whether so many logits are few on a GPU, where chunks of them buy bytes with traffic.

    By the compiler's figures for an H100, attention by blocks moves 1.1 to 2.3 of autodiff's bytes and
    linear + cross-entropy of 16 bits 1.3 to 2.7. Below 24 × L2 (1.2 GiB) memory is not what is missing.
    """
    return machine.platform == "gpu" and 4 * logits < 24 * machine.caches[-1]


def token_chunk(tokens: int, vocabulary: int, machine: Machine) -> int:
    """The default number of tokens in a chunk of linear + cross-entropy.

    With every chunk the cotangent of the matrix is read and written, and the products of its tokens have to
    hide that. On a CPU a sixteenth of the tokens, at most 2²³ logits, but at least 16 vectors (256): 1024
    tokens, d 512, vocabulary 50257 took 1.5 of autodiff's time by chunks of 64 tokens, 1.12 by 128, 0.97 by
    256 (0.09, 0.15, 0.28 of its bytes). On a GPU at least 32 warps (1024): on an H100, 4096 × 256 × 32k moves
    1.33 of autodiff's bytes by 256, 1.12 by 512, 1.02 by 1024 (0.07, 0.14, 0.26 of the temporary bytes). On a
    TPU as many as half of the vector memory holds (v5e, the same: 512, 0.71 of the cycles; 1.03 by 1024).
    """
    of_logits = 4 * max(vocabulary, 1)
    if machine.platform == "tpu":
        most = max(machine.caches[-1] // 2 // of_logits, 128)
    elif machine.platform == "gpu":
        most = max(-(-tokens // 16), 32 * lanes(machine))
    else:
        most = max(min(-(-tokens // 16), 16 * near_cache(machine) // of_logits), 16 * lanes(machine))
    count = -(-tokens // most)
    return -(-tokens // max(count, 1))


def vocabulary_piece(width: int, vocabulary: int, machine: Machine) -> int:
    """Columns of a `width × vocabulary` cotangent that are added up at a time, to stay in the cache.

    2048 of width 256. An accelerator adds all of them: every piece would be a step of a loop.
    """
    if machine.platform != "cpu":
        return max(vocabulary, 1)
    return max(_power_of_two(near_cache(machine) / (4 * max(width, 1))), 8 * lanes(machine))


def row_form(rows: int, matrix_bytes: int, machine: Machine) -> str:
    """How to multiply so many rows with the transpose of a matrix in a loop, as `row_products` names it.

    An accelerator reads a matrix in either order.
    """
    if machine.platform != "cpu":
        return "plain"
    near = near_cache(machine)
    if rows == 1:
        return "plain" if near // 2 < matrix_bytes <= 2 * near else "turned"
    return "columns" if rows <= lanes(machine) and matrix_bytes >= 3 * near // 2 else "turned"
