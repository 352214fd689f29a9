"""Tests import each other's tables, and examples by name; they run on eight simulated devices, most
of them on the first.
"""

import sys
from pathlib import Path

import jax
import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "examples")]
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(autouse=True, scope="module")
def forget():
    """Compiled programs of one module are of no use to the next, and all together they take many
    gigabytes.
    """
    yield
    jax.clear_caches()
