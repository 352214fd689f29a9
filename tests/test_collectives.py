"""The compiler's figures on CPU: a tree that is split over devices takes one message, and a record
no array of its own.
"""

import jax
import jax.numpy as jnp
import optax
import pytest
from compiling import optimized
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optaxclip
from optaxclip import scopes, skip_nonfinite, thresholds


def messages(program):
    """How many collectives a program runs, those of branches not counted."""
    text = program.as_text()
    entry = text[text.index("\nENTRY ") :]
    return sum(
        entry.count(f" {name}(") + entry.count(f" {name}-start(")
        for name in ("all-reduce", "all-gather", "reduce-scatter")
    )


ADAPTIVE = [optaxclip.autoclip(), optaxclip.zclip(), optaxclip.adagc(), optaxclip.growth_clip()]
FIXED = [
    optaxclip.clip_by_global_norm(1.0),
    optaxclip.clip_by_norm(1.0),
    optaxclip.clip({"a": 1.0, "b": 1.0}, scope=scopes.group(lambda path: path[0])),
    optaxclip.clip(
        {"a": thresholds.by_global_norm(1.0), "b": thresholds.by_global_norm(jnp.inf)},
        scope=scopes.group(lambda path: path[0]),
    ),
    optaxclip.clip_by_trust_ratio(0.1),
]


@pytest.mark.parametrize("i", range(len(FIXED + ADAPTIVE)))
@pytest.mark.parametrize("where", ["jit", "shard_map"])
def test_a_tree_is_measured_with_one_message(where, i):
    optimizer = skip_nonfinite(optax.chain((FIXED + ADAPTIVE)[i], optax.adam(1e-3)))
    grads = {f"{name}{k}": jnp.ones((8, 3)) for name in "ab" for k in range(5)}
    grads |= {"a_whole": jnp.ones(3), "b_large": jnp.ones((8, 4096))}
    specs = {name: P() if name == "a_whole" else P("x") for name in grads}
    devices = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))

    def update(g):
        return optimizer.update(g, optimizer.init(g), g)[0]

    if where == "jit":
        sharding = {name: NamedSharding(devices, spec) for name, spec in specs.items()}
        run = jax.jit(update, in_shardings=(sharding,), out_shardings=sharding)
    else:
        run = jax.jit(jax.shard_map(update, mesh=devices, in_specs=(specs,), out_specs=specs))
    assert messages(optimized(run.lower(grads))) == 1


@pytest.mark.parametrize("limit", [0.5, 5.0])
def test_what_is_recorded_of_numbers_needs_no_other_array_of_floats(limit):
    gradient = jnp.ones((1000, 1000))
    clip = optaxclip.clip_by_value(limit)
    program = optimized(jax.jit(clip.update).lower(gradient, clip.init(gradient)))
    assert program.memory_analysis().temp_size_in_bytes < 0.3 * gradient.nbytes
