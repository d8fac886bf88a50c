"""Every test runs in float64 and sees eight devices."""

import os

# Read by XLA when jax is imported, so it is set first.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax

jax.config.update("jax_enable_x64", True)
