"""Tests import each other's tables, and examples by name; they run on eight simulated devices, most of them on the first."""

import sys
from pathlib import Path

import jax

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "examples")]
jax.config.update("jax_num_cpu_devices", 8)
