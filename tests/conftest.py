"""Every test runs in float64 and sees eight devices."""

import gc
import os
from collections import defaultdict
from collections.abc import Iterator
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
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

NIGHTLY = bool(os.environ.get("FUNCPROP_NIGHTLY"))

# The same cases in every run; in the nightly one new ones, and a failure says how to draw it again.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("random", print_blob=True, deadline=None, database=None)
settings.load_profile("random" if NIGHTLY else "fixed")

jax.config.update("jax_enable_x64", True)

# Programs and traces live until the end: they need not be looked through for garbage every moment.
gc.set_threshold(50_000, 20, 20)


@pytest.fixture
def small_heap() -> Iterator[None]:
    """Collections of garbage look at what the test itself makes: what is left of others takes seconds."""
    gc.freeze()
    yield
    gc.unfreeze()


def pytest_configure(config: pytest.Config) -> None:
    """Say what the marks are."""
    config.addinivalue_line("markers", "nightly: runs with FUNCPROP_NIGHTLY alone")
    config.addinivalue_line(
        "markers", "sampled(count): of the cases chosen, at most so many run unless FUNCPROP_NIGHTLY"
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave to the nightly run what is marked so, and all but some evenly spaced cases of a sampled test.

    This comes after `-k`: cases that were asked for by name run, if they are few enough.
    """
    if NIGHTLY:
        return
    cases: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("sampled"):
            cases[item.nodeid.partition("[")[0]].append(item)
    left = {item for item in items if item.get_closest_marker("nightly")}
    for found in cases.values():
        mark = found[0].get_closest_marker("sampled")
        assert mark is not None
        count = min(mark.args[0], len(found))
        chosen = {round(i * (len(found) - 1) / max(1, count - 1)) for i in range(count)}
        left.update(item for i, item in enumerate(found) if i not in chosen)
    if left:
        config.hook.pytest_deselected(items=list(left))
        items[:] = [item for item in items if item not in left]
