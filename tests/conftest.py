"""Tests import each other's tables, and examples by name; they run on eight simulated devices, most
of them on the first.
"""

import gc
import os
import sys
from pathlib import Path

import jax
import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "examples")]
jax.config.update("jax_num_cpu_devices", 8)

from compiling import FLAGS  # noqa: E402 (found on the path above)

os.environ.setdefault("XLA_FLAGS", FLAGS)  # read when the first program is compiled

# Compiled programs are kept in the environment's folder: workers share them, and a second run
# compiles only what changed. Measured: 66 s of processor time for `-k autoclip`, then 42.
jax.config.update("jax_compilation_cache_dir", str(Path(sys.prefix) / "compiled"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


# A plugin for runs of its own: to import it here would change the library under the other tests.
collect_ignore = ["plain.py"]

# The files that take longest, in this order: they begin, so that no worker ends with one alone.
LONGEST = [
    f"test_{name}.py"
    for name in (
        "contract every_optimizer conformance per_example sharding guard testing backward factored "
        "adaptive thresholds self_healing error_feedback telemetry norms packing methods scopes"
    ).split()
]


def pytest_collection_modifyitems(items):
    order = {name: k for k, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def pytest_collection_finish():
    """What was imported stays: the garbage collector need not look at it again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(autouse=True, scope="module")
def forget():
    """Compiled programs of one module are of no use to the next, and all together they take many
    gigabytes.
    """
    yield
    jax.clear_caches()
