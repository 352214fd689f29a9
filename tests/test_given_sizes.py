"""`update(..., sizes=...)`: sizes that were measured elsewhere, in place of the first step."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import optaxclip
from optaxclip import norms, responses, scopes, telemetry, thresholds

GRADS = {"a": jnp.array([[3.0, 1.0], [4.0, 2.0]]), "b": jnp.array([0.5]), "c": jnp.ones(3)}
BY_NAME = scopes.group(lambda path: "first" if path == "a" else "rest")
SCOPES = {
    "tree": scopes.tree(),
    "group": BY_NAME,
    "leaf": scopes.leaf(),
    "unit": scopes.unit(),
    "element": scopes.element(),
}
RULES = {"number": 1.0, "learned": thresholds.ema(0.5), "schedule": lambda step: 1.0 + step}


def sizes_of(scope, grads, norm):
    """The sizes that the clip itself measures, in the form in which they are given."""
    if scope not in ("unit", "element"):
        clip = optaxclip.clip(1.0, SCOPES[scope], norm=norm)
        reading = clip.update(grads, clip.init(grads))[1].reading
        return dict(zip(telemetry.group_names(reading), reading.size_before, strict=True))
    if scope == "element":
        return jax.tree.map(jnp.abs, grads)
    return {
        "a": jnp.linalg.norm(grads["a"], axis=0, keepdims=True),
        "b": jnp.abs(grads["b"]),
        "c": jnp.linalg.norm(grads["c"])[None],
    }


@pytest.mark.parametrize("response", [responses.rescale, responses.smooth, responses.drop])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scope", SCOPES)
def test_given_the_sizes_that_it_would_measure_a_clip_does_the_same(scope, rule, response):
    clip = optaxclip.clip(RULES[rule], SCOPES[scope], response=response)
    states = [clip.init(GRADS)] * 2
    for scale in 1.0, 3.0, 0.5:
        grads = jax.tree.map(lambda x, s=scale: s * x, GRADS)
        sizes = sizes_of(scope, grads, norms.l2())
        out, states[0] = jax.jit(clip.update)(grads, states[0])
        given, states[1] = jax.jit(lambda g, s, z: clip.update(g, s, sizes=z))(
            grads, states[1], sizes
        )
        pairs = zip(*map(jax.tree.leaves, ((out, states[0]), (given, states[1]))), strict=True)
        for one, other in pairs:
            np.testing.assert_allclose(one, other, rtol=1e-6)


def test_a_number_is_enough_for_a_tree_and_an_array_has_the_order_of_the_names():
    clip = optaxclip.clip_by_global_norm(1.0)
    for size in 10.0, np.float64(10), jnp.array(10, jnp.bfloat16), jnp.array([10.0]), 10:
        updates, state = clip.update(GRADS, clip.init(GRADS), sizes=size)
        np.testing.assert_allclose(updates["c"], 0.1, rtol=1e-6)
        assert state.reading.size_before == 10
    leaves = optaxclip.clip_by_norm(1.0)
    updates, _ = leaves.update(GRADS, leaves.init(GRADS), sizes=jnp.array([2.0, 4.0, 8.0]))
    np.testing.assert_allclose(updates["a"], GRADS["a"] / 2, rtol=1e-6)
    np.testing.assert_allclose(updates["c"], GRADS["c"] / 8, rtol=1e-6)


def test_the_updates_are_not_read_for_a_norm():
    clip = optaxclip.clip_by_global_norm(1.0, record=False)  # the reading reduces the sizes
    state = clip.init(GRADS)
    program = jax.make_jaxpr(lambda g, s: clip.update(g, s, sizes=5.0)[0])(GRADS, state)
    read = jax.make_jaxpr(lambda g, s: clip.update(g, s)[0])(GRADS, state)
    assert "reduce_sum" in str(read) and "reduce_" not in str(program)


@pytest.mark.parametrize("nonfinite", ["propagate", "zero"])
def test_sizes_that_are_not_finite_go_by_the_policy_and_negative_ones_are_zero(nonfinite):
    clip = optaxclip.clip_by_global_norm(1.0, nonfinite=nonfinite)
    updates, state = clip.update(GRADS, clip.init(GRADS), sizes=jnp.inf)
    want = 0 if nonfinite == "zero" else np.nan
    np.testing.assert_array_equal(updates["c"], np.full(3, want))
    assert state.reading.nonfinite_steps == 1
    _, state = clip.update(GRADS, state, sizes=-3.0)
    assert state.reading.size_before == 0 and state.reading.clipped_share == 0


def test_stages_as_separate_programs_share_one_norm():
    """Each measures its part; the root of the sum of squares goes to all."""
    clip = optaxclip.clip_by_global_norm(1.0)
    stages = [{"w": jnp.array([3.0])}, {"w": jnp.array([4.0])}]
    parts = [jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(stage))) for stage in stages]
    size = jnp.sqrt(sum(part**2 for part in parts))
    out = [clip.update(stage, clip.init(stage), sizes=size)[0]["w"] for stage in stages]
    np.testing.assert_allclose(np.concatenate(out), [0.6, 0.8], rtol=1e-6)


def test_in_shard_map_sizes_are_taken_as_whole():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    clip = optaxclip.clip_by_global_norm(1.0)

    state = clip.init(jnp.zeros(8))

    def step(grads):
        return clip.update(grads, state, sizes=4.0)[0]

    for check in True, False:
        mapped = jax.shard_map(step, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=check)
        np.testing.assert_allclose(mapped(jnp.arange(8.0)), jnp.arange(8.0) / 4, rtol=1e-6)


def test_sizes_in_a_chain_reach_the_clip():
    optimizer = optax.chain(optaxclip.clip_by_global_norm(1.0), optax.sgd(1.0))
    updates, _ = optimizer.update(GRADS, optimizer.init(GRADS), sizes=2.0)
    np.testing.assert_allclose(updates["c"], -0.5, rtol=1e-6)


def test_sizes_and_a_tree_to_measure_exclude_each_other():
    clip = optaxclip.clip_by_global_norm(1.0)
    with pytest.raises(ValueError, match=re.escape("sizes and measured are both given")):
        clip.update(GRADS, clip.init(GRADS), sizes=1.0, measured=GRADS)


def test_a_rule_sees_the_extra_arguments_of_update():
    """A threshold that follows the loss."""
    rule = thresholds.relative_to_params(1.0)._replace(
        limit=lambda sizes, state, context: 2 * context.extra["value"], uses_params=False
    )
    clip = optaxclip.clip(rule, scopes.tree())
    updates, state = clip.update(jnp.array([3.0, 4.0]), None, value=jnp.array(0.5))
    np.testing.assert_allclose(updates, [0.6, 0.8], rtol=1e-6)
    assert state.reading.limit == 1
