"""Every test runs in float64 and sees eight devices."""

import gc
import os
from importlib.metadata import version

FLAGS = [
    "--xla_force_host_platform_device_count=8",
    # Most of a test's time goes into compiling programs that run once; unoptimised code computes the same and
    # is made in half of the time.
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if version("jaxlib").startswith("0.10."):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")  # Later versions have no other way.

# Read by XLA when jax is imported, so it is set first.
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])

import jax  # noqa: E402
from hypothesis import settings  # noqa: E402

# The same cases in every run; with FUNCPROP_RANDOM set new ones, and a failure says how to draw it again.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("random", print_blob=True, deadline=None, database=None)
settings.load_profile("random" if os.environ.get("FUNCPROP_RANDOM") else "fixed")

jax.config.update("jax_enable_x64", True)

# Programs and traces live until the end: they need not be looked through for garbage every moment.
gc.set_threshold(50_000, 20, 20)
