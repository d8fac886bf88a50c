"""Devices to plan for: those of this process, a number of them, or accelerators that are not there."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import jax

from funcprop._jax.topologies import h100_devices, tpu_devices


@dataclass(frozen=True)
class DeviceKind:
    """A kind of device, by the figures of its maker; plans are only ordered by them.

    Attributes:
        platform: "cpu", "tpu" or "cuda".
        memory: bytes of one device; None for a host, whose memory the user knows.
        flops: operations in a second.
        link: bytes in a second that a device sends its neighbours.
        axes: of its network.
    """

    platform: str
    memory: int | None
    flops: float
    link: float
    axes: int = 1


_GIB = 2**30
MACHINES = {
    "host": DeviceKind("cpu", None, 5e10, 5e9),
    "v4": DeviceKind("tpu", 32 * _GIB, 275e12, 300e9, 3),
    "v5e": DeviceKind("tpu", 16 * _GIB, 197e12, 200e9, 2),
    "v5p": DeviceKind("tpu", 95 * _GIB, 459e12, 600e9, 3),
    "v6e": DeviceKind("tpu", 32 * _GIB, 918e12, 450e9, 2),
    "h100": DeviceKind("cuda", 80 * 10**9, 989e12, 450e9),
}


@dataclass(frozen=True)
class DeviceTarget:
    """How many devices of which kind: a topology `on` that is not there, or devices that are `present`."""

    count: int
    machine: DeviceKind
    on: str | None = None
    present: tuple[Any, ...] = ()

    def devices(self, count: int) -> list[Any]:
        """So many of the devices, real or described by a compiler.

        Raises:
            ModuleNotFoundError: the compiler for a topology is not installed.
            RuntimeError: the compiler does not know the topology.
        """
        return list(self.present[:count]) if self.on is None else _described(self.on, self.machine)[:count]

    @property
    def is_present(self) -> bool:
        """Whether programs can be run on them."""
        return self.on is None


def target_of(devices: int | Sequence[Any] | None, on: str | None) -> DeviceTarget:
    """The devices that `devices=` or `on=` names.

    Raises:
        TypeError: both are given, or `devices` are none.
        ValueError: there are not so many devices, or the topology is not known.
    """
    if on is not None:
        if devices is not None:
            raise TypeError(f"devices={devices!r} and on={on!r}: give one of them.")
        found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", on)
        if found is None or found[1] not in MACHINES or found[1] == "host":
            known = ", ".join(name for name in MACHINES if name != "host")
            raise ValueError(f"on={on!r} is not known; write kind:shape, as v5e:4x4 or h100:8, of {known}.")
        sizes, machine = [int(size) for size in found[2].split("x")], MACHINES[found[1]]
        if len(sizes) != machine.axes or 0 in sizes:
            shape = "x".join("4" * machine.axes)
            raise ValueError(f"on={on!r}: {found[1]} has {machine.axes} axes; write {found[1]}:{shape}.")
        return DeviceTarget(math.prod(sizes), machine, on)
    if devices is None or isinstance(devices, Integral):
        present = jax.devices()
        count = len(present) if devices is None else int(devices)
    else:
        present = list(devices) if isinstance(devices, Iterable) else []
        count = len(present)
        if not all(isinstance(device, jax.Device) for device in present or [None]):
            raise TypeError(f"devices={devices!r}: pass how many, or a list of devices as of jax.devices().")
    if count < 1:
        raise ValueError(f"devices={devices!r}: pass at least 1, or on='v5e:4x4' for devices not there.")
    if count > len(present):
        raise ValueError(
            f"devices={count}, of which there {'is' if len(present) == 1 else 'are'} {len(present)}; use no "
            "more, or on='v5e:4x4' for devices that are not there "
            f"(for more host devices, XLA_FLAGS=--xla_force_host_platform_device_count={count})."
        )
    return DeviceTarget(count, MACHINES["host"], None, tuple(present[:count]))


def _described(on: str, machine: DeviceKind) -> list[Any]:
    if machine.platform == "tpu":
        _require("libtpu", on, "libtpu")
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        return tpu_devices(on)
    _require("jax_plugins.xla_cuda12", on, "jax-cuda12-plugin jax-cuda12-pjrt")
    return h100_devices(math.prod(map(int, on.partition(":")[2].split("x"))))


def _require(module: str, on: str, packages: str) -> None:
    """Raise unless the compiler for a kind of device is installed.

    Raises:
        ModuleNotFoundError: with what to install.
    """
    try:
        there = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        there = False
    if not there:
        raise ModuleNotFoundError(
            f"on={on!r}: plans are made without, but compiling one needs its compiler: pip "
            f"install {packages} "
            "(the extra funcprop[accelerators])."
        )
