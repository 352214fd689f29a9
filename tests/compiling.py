"""How the tests compile: fast, because most programs run once; as a user's program does, where a
test looks at the program itself.
"""

from importlib.metadata import version

# A sixth of the time to compile, and the same arithmetic up to rounding.
FAST = {"xla_backend_optimization_level": 0, "xla_cpu_parallel_codegen_split_count": 1}
DEFAULTS = {"xla_backend_optimization_level": 3, "xla_cpu_parallel_codegen_split_count": 32}
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):  # later ones know no such flag
    FAST["xla_cpu_use_fusion_emitters"] = False
    DEFAULTS["xla_cpu_use_fusion_emitters"] = True

FLAGS = " ".join(f"--{name}={value}" for name, value in FAST.items())


def optimized(lowered):
    """The executable that a user gets."""
    return lowered.compile(compiler_options=DEFAULTS)
