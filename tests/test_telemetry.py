"""What clipping did is found wherever the clip is, under every transformation of JAX."""

import dataclasses

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import optaxclip
from optaxclip import norms, scopes, telemetry, thresholds
from optaxclip.thresholds import ranks

GRADS = {"enc": {"w": jnp.array([[3.0, 0.0], [0.0, 4.0]])}, "head": jnp.array([12.0])}
CLIP = optaxclip.clip_by_global_norm(1.0)
BY_LAYER = scopes.group(lambda path: path.split("/")[0])


def stepped(optimizer, steps=1, grads=GRADS):
    state = optimizer.init(GRADS)
    for _ in range(steps):
        _, state = optimizer.update(grads, state, GRADS)
    return state


def first_leaf_only(optimizer):
    return optax.masked(optimizer, {"enc": {"w": True}, "head": False})


NESTED = {
    "alone": (CLIP, [13]),
    "chain": (optax.chain(CLIP, optax.adam(1e-3)), [13]),
    "chains in chains": (
        optax.chain(optax.chain(optax.identity(), optax.chain(CLIP)), optax.sgd(1.0)),
        [13],
    ),
    "masked": (first_leaf_only(CLIP), [5]),
    "multi_transform": (
        optax.multi_transform(
            {"a": CLIP, "b": optax.chain(CLIP, optax.sgd(1.0))}, {"enc": {"w": "a"}, "head": "b"}
        ),
        [5, 12],
    ),
    "MultiSteps": (optax.MultiSteps(optax.chain(CLIP, optax.sgd(1.0)), 1), [13]),
    "inject_hyperparams": (
        optax.inject_hyperparams(optaxclip.clip_by_global_norm)(max_norm=1.0),
        [13],
    ),
    "apply_if_finite": (optax.apply_if_finite(optax.chain(CLIP, optax.sgd(1.0)), 3), [13]),
    "skip_nonfinite": (optaxclip.skip_nonfinite(optax.chain(CLIP, optax.sgd(1.0))), [13]),
    "skip_spikes": (optax.chain(optax.identity(), optaxclip.skip_spikes(CLIP, 100.0)), [13]),
    "error_feedback": (optaxclip.error_feedback(CLIP), [13]),
    "stable adam": (optaxclip.scale_by_stable_adam(scope=scopes.tree()), [1 / np.sqrt(5 / 2)]),
    "two clips": (optax.chain(CLIP, optaxclip.clip_by_value(0.5)), [13, 12 / 13]),
    "clip between bounds": (optaxclip.clip_by_value(-1.0, 2.0), [12, 0]),
    "spectral": (optaxclip.spectral_clip(1.0), [12]),
    "without record": (optaxclip.clip(1.0, scopes.tree(), record=False), []),
    "no clip": (optax.adam(1e-3), []),
}


@pytest.mark.parametrize("name", NESTED)
def test_readings_are_found_however_deep_they_are(name):
    optimizer, sizes = NESTED[name]
    if name == "stable adam":
        sizes = [np.sqrt(3 / 5)]  # of five gradients two are zero
    for state in stepped(optimizer), jax.jit(lambda: stepped(optimizer))():
        found = [float(jnp.max(reading.size_before)) for reading in telemetry.readings(state)]
        np.testing.assert_allclose(found, sizes, rtol=1e-6)


def test_readings_are_found_in_the_states_of_flax():
    optimizer = optax.chain(CLIP, optax.sgd(0.1))
    state = TrainState.create(apply_fn=None, params=GRADS, tx=optimizer).apply_gradients(
        grads=GRADS
    )
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    trainer = nnx.Optimizer(model, optimizer, wrt=nnx.Param)
    trainer.update(model, jax.tree.map(lambda x: 3 * jnp.ones_like(x), nnx.state(model, nnx.Param)))
    for holder, size in (state, 13), (trainer, np.sqrt(27)), (trainer.opt_state, np.sqrt(27)):
        (reading,) = telemetry.readings(holder)
        assert isinstance(reading.measured, jax.Array)
        np.testing.assert_allclose(reading.size_before, [size], rtol=1e-6)
        assert telemetry.metrics(holder)["clip/steps"] == 1


GUARDED = optaxclip.skip_nonfinite(optax.chain(CLIP, optax.sgd(0.1)))
# one in another
GUARDS = optaxclip.skip_nonfinite(
    optax.MultiSteps(optaxclip.skip_spikes(GUARDED, 100.0), 2).gradient_transformation()
)


class TwoOptimizers(TrainState):
    other: optax.OptState = ()


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Registered:
    opt_state: optax.OptState
    average: optax.OptState


class Trainer:
    """An object that JAX takes for a leaf, and that holds itself, too."""

    def __init__(self, **states):
        self.states, self.me, self.optimizer = states, self, CLIP


def train_state(optimizer, other):
    return TwoOptimizers.create(apply_fn=None, params=GRADS, tx=optimizer, other=other)


def nnx_optimizer(optimizer):
    return nnx.Optimizer(nnx.Linear(2, 1, rngs=nnx.Rngs(0)), optimizer, wrt=nnx.Param)


HOLDERS = {  # what holds states, and how many clips and guards are in it
    "sam": (lambda: optax.contrib.sam(GUARDED, optax.chain(GUARDED)).init(GRADS), 2, 2),
    "train state": (lambda: train_state(GUARDED, GUARDED.init(GRADS)), 2, 2),
    "second state only": (lambda: train_state(optax.sgd(1.0), {"head": GUARDED.init(GRADS)}), 1, 1),
    "nnx optimizer": (lambda: nnx_optimizer(GUARDED), 1, 1),
    "nnx optimizers": (
        lambda: {"generator": nnx_optimizer(GUARDED), "critic": (nnx_optimizer(CLIP),)},
        2,
        1,
    ),
    "dict": (lambda: {"a": GUARDED.init(GRADS), "params": GRADS, "b": [CLIP.init(GRADS)]}, 2, 1),
    "tuple": (lambda: (GRADS, GUARDED.init(GRADS), 0, None, "text", len), 1, 1),
    "dataclass": (lambda: Registered(GUARDED.init(GRADS), GUARDED.init(GRADS)), 2, 2),
    "object": (lambda: Trainer(a=GUARDED.init(GRADS), b=nnx_optimizer(CLIP)), 2, 1),
    "guards in guards": (lambda: GUARDS.init(GRADS), 1, 3),
    "guards in guards in a dict": (
        lambda: {"opt_state": (), "all": {"mine": GUARDS.init(GRADS)}},
        1,
        3,
    ),
    "no state": (lambda: {"params": GRADS, "model": nnx.Linear(2, 1, rngs=nnx.Rngs(0))}, 0, 0),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_clips_and_guards_are_found_whatever_holds_them(name):
    make, clips, guards = HOLDERS[name]
    holder = make()
    assert len(telemetry.readings(holder)) == clips
    found = telemetry.metrics(holder)
    assert len([key for key in found if key.endswith("/limit")]) == clips
    assert ("clip/skipped_steps" in found) == (guards > 0)
    assert telemetry.last_sizes(holder) == {} and telemetry.suggest(holder) == []


def test_the_steps_that_guards_in_guards_skipped_are_counted():
    optimizer = optaxclip.skip_nonfinite(
        optax.MultiSteps(optaxclip.skip_spikes(GUARDED, 10.0), 2).gradient_transformation()
    )
    state = optimizer.init(GRADS)
    for scale in (
        jnp.nan,
        1.0,
        1.0,
        0.1,
        0.1,
    ):  # the outer one skips the first, the next one the mean of two
        _, state = optimizer.update(
            jax.tree.map(lambda x, scale=scale: x * scale, GRADS), state, GRADS
        )
    found = telemetry.metrics({"opt_state": (), "guarded": [state, state]})
    assert found["clip/skipped_steps"] == 2 * (1 + 1) and found["clip_0/steps"] == 1


@pytest.mark.parametrize(
    "read", [telemetry.readings, telemetry.metrics, telemetry.last_sizes, telemetry.suggest]
)
@pytest.mark.parametrize(
    "transform",
    [
        CLIP,
        optax.chain(CLIP, optax.sgd(1.0)),
        GUARDED,
        optax.MultiSteps(CLIP, 2),
        optax.adam(1.0),
        telemetry.monitor(),
    ],
)
def test_an_optimizer_in_place_of_its_state_is_refused(read, transform):
    words = (
        f"opt_state must be a state, got the {type(transform).__name__} that makes it; "
        "pass the state that init or"
    )
    with pytest.raises(TypeError, match="^" + words):
        read(transform)


def numbers(metrics):
    return {name: float(value) for name, value in metrics.items()}


def test_metrics_of_one_clip_are_numbers_of_its_largest_group():
    state = stepped(optaxclip.clip({"enc": 1.0, "head": 6.0}, scope=BY_LAYER), steps=2)
    assert numbers(telemetry.metrics(state)) == pytest.approx(
        {
            "clip/size_before": 12,
            "clip/size_after": 6,
            "clip/limit": 6,
            "clip/scale": 0.2,
            "clip/clipped_share": 1,
            "clip/largest": 1,
            "clip/steps": 2,
            "clip/clipped_steps": 2,
            "clip/nonfinite_steps": 0,
            "clip/recent_share": 1,
        }
    )


def test_with_parameters_groups_have_their_names():
    cases = {
        "enc/w": (5, optaxclip.clip_by_norm(1.0)),
        "enc": (5, optaxclip.clip({"enc": 1.0, "head": 6.0}, scope=BY_LAYER)),
        "head": (12, optax.chain(optax.identity(), optaxclip.clip_by_norm(1.0))),
    }
    for name, (size, clip) in cases.items():
        found = telemetry.metrics(stepped(clip), GRADS, prefix="grad")
        assert found[f"grad/size_before/{name}"] == size
        assert len(found) == 10 + 4 * 2
    # a tree is one group, with nothing to add
    assert len(telemetry.metrics(stepped(CLIP), GRADS)) == 10


def test_names_are_those_of_the_leaves_that_a_mask_lets_through():
    state = stepped(optax.masked(optaxclip.clip_by_norm(1.0), {"enc": {"w": False}, "head": True}))
    (reading,) = telemetry.readings(state)
    assert telemetry.group_names(reading) == ["head"]


def test_units_and_elements_are_told_by_leaf():
    # of elements, whether any was clipped; the exact share if it is asked for
    cases = [(scopes.unit(), True, [1, 1]), (scopes.element(), True, [1, 1])]
    for scope, record, share in [*cases, (scopes.element(), "full", [0.5, 1])]:
        state = stepped(optaxclip.clip(1.0, scope=scope, record=record))
        found = telemetry.metrics(state, GRADS)
        assert found["clip/size_before"] == 12 and found["clip/size_before/enc/w"] == 4
        assert [found["clip/clipped_share/enc/w"], found["clip/clipped_share/head"]] == share
        assert all(value.shape == () for value in found.values())


def test_several_clips_are_counted_from_zero():
    found = telemetry.metrics(stepped(NESTED["two clips"][0]))
    assert len(found) == 20 and found["clip_0/size_before"] == 13 and found["clip_1/limit"] == 0.5


def test_a_state_without_clips_has_no_metrics():
    assert telemetry.metrics(optax.adam(1e-3).init(GRADS)) == {}


STEPLESS = {
    "size_before",
    "size_after",
    "limit",
    "scale",
    "clipped_share",
    "recent_share",
    "watched",
    "watched_limit",
}


def assert_nothing_is_told(found):
    for key, value in found.items():
        kind = key.split("/")[1]
        if kind in STEPLESS:
            assert np.isnan(value).all(), key
        else:
            assert (np.asarray(value) == (-1 if kind == "largest" else 0)).all(), key


@pytest.mark.parametrize(
    "clip",
    [
        CLIP,
        optaxclip.clip_by_norm(1.0),
        optaxclip.clip_by_value(1.0),
        telemetry.monitor(),
        optaxclip.skip_spikes(CLIP, 1e3),
    ],
)
def test_before_the_first_step_nothing_is_told_and_the_keys_are_the_same(clip):
    state, params = clip.init(GRADS), GRADS
    after = telemetry.metrics(stepped(clip), params)
    for found in (
        telemetry.metrics(state, params),
        jax.jit(lambda: telemetry.metrics(clip.init(GRADS), params))(),
    ):
        assert_nothing_is_told(found)
        chex.assert_trees_all_equal_shapes_and_dtypes(found, after)
    assert (
        not any(np.isnan(value) for value in after.values()) and after.get("clip/largest", 0) >= 0
    )
    assert_nothing_is_told(
        telemetry.metrics(
            jax.vmap(lambda x: clip.init(jax.tree.map(lambda g: x * g, GRADS)))(jnp.ones(3))
        )
    )


def test_multi_steps_tell_nothing_before_the_first_real_step_and_repeat_the_last_one_after_it():
    optimizer = optax.MultiSteps(optax.chain(optaxclip.skip_spikes(CLIP, 1e3), optax.sgd(1.0)), 3)

    def step(state, scale):
        _, state = optimizer.update(jax.tree.map(lambda x: scale * x, GRADS), state, GRADS)
        return state, telemetry.metrics(state)

    state, found = jax.jit(lambda scales: jax.lax.scan(step, optimizer.init(GRADS), scales))(
        jnp.arange(1.0, 9.0)
    )
    assert_nothing_is_told({key: value[:2] for key, value in found.items()})
    np.testing.assert_allclose(
        found["clip/size_before"][2:], 13 * np.array([2, 2, 2, 5, 5, 5]), rtol=1e-6
    )
    np.testing.assert_allclose(
        found["clip/watched"][2:], 13 * np.array([2, 2, 2, 5, 5, 5]), rtol=1e-6
    )
    np.testing.assert_array_equal(found["clip/steps"], [0, 0, 1, 1, 1, 2, 2, 2])


def test_seeds_of_which_some_have_not_begun_are_told_apart():
    _, one = CLIP.update(GRADS, CLIP.init(GRADS))
    states = jax.tree.map(lambda *x: jnp.stack(x), CLIP.init(GRADS), one)
    found = telemetry.metrics(states)
    np.testing.assert_array_equal(found["clip/size_before"], [np.nan, 13])
    np.testing.assert_array_equal(found["clip/largest"], [-1, 0])


def test_empty_trees_and_zero_gradients_have_metrics_without_nan():
    for grads in {}, jax.tree.map(jnp.zeros_like, GRADS):
        for clip in CLIP, optaxclip.clip_by_norm(1.0), optaxclip.clip_by_value(1.0):
            state = clip.update(grads, clip.init(grads))[1]
            found = telemetry.metrics(state, grads)
            assert found["clip/scale"] == 1 and not any(
                np.isnan(value).any() for value in found.values()
            )


def test_the_largest_group_is_the_one_that_is_not_a_number():
    grads = {"enc": {"w": jnp.array([[jnp.nan, 0.0], [0.0, 4.0]])}, "head": jnp.array([12.0])}
    found = telemetry.metrics(stepped(optaxclip.clip_by_norm(1.0), grads=grads))
    assert (
        found["clip/largest"] == 0
        and np.isnan(found["clip/size_before"])
        and found["clip/nonfinite_steps"] == 1
    )


def test_metrics_run_inside_scan_and_over_seeds():
    def step(state, scale):
        _, state = CLIP.update(jax.tree.map(lambda x: x * scale, GRADS), state)
        return state, telemetry.metrics(state)

    def run(scales):
        return jax.lax.scan(step, CLIP.init(GRADS), scales)

    scales = jnp.array([[0.01, 1.0, jnp.nan], [1.0, 2.0, 3.0]])
    states, found = jax.jit(jax.vmap(run))(scales)
    np.testing.assert_allclose(found["clip/size_before"][1], [13, 26, 39], rtol=1e-6)
    np.testing.assert_array_equal(found["clip/clipped_steps"], [[0, 1, 1], [1, 2, 3]])
    np.testing.assert_array_equal(found["clip/nonfinite_steps"][:, -1], [1, 0])
    # of the vmapped state itself
    np.testing.assert_array_equal(telemetry.metrics(states)["clip/steps"], [3, 3])


@pytest.mark.parametrize(
    "scope", [scopes.tree(), BY_LAYER, scopes.leaf(), scopes.unit(), scopes.element()]
)
def test_metrics_of_sharded_gradients_are_those_of_whole_ones(scope):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    clip = optax.chain(
        telemetry.monitor(scope=scope), optaxclip.clip(thresholds.ema(1.0), scope=scope)
    )
    whole = {"enc": {"w": jnp.arange(32.0).reshape(8, 4)}, "head": jnp.arange(4.0)}

    def run(grads):
        state = clip.init(grads)
        for scale in 1.0, 2.0:
            _, state = clip.update(jax.tree.map(lambda x, scale=scale: x * scale, grads), state)
        return telemetry.metrics(state, grads)

    sharded = jax.device_put(
        whole, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    )
    found, want = jax.jit(run)(sharded), jax.jit(run)(whole)
    assert float(want["clip/size_before"]) > 30
    chex.assert_trees_all_close(found, want, rtol=1e-6)


def test_names_survive_serialization():
    state = stepped(optaxclip.clip_by_norm(1.0))
    restored = flax.serialization.from_bytes(state, flax.serialization.to_bytes(state))
    chex.assert_trees_all_equal(restored, state)
    assert telemetry.group_names(restored.reading) == ["enc/w", "head"]
    assert jax.tree.structure(restored) == jax.tree.structure(state)


# The monitor


@pytest.mark.parametrize("scope", [scopes.tree(), scopes.leaf(), scopes.unit()])
def test_a_monitor_changes_nothing(scope):
    monitor = telemetry.monitor(scope=scope)
    for value in 1.0, 0.0, jnp.nan, jnp.inf, 1e-40:
        grads = {"w": jnp.full((2, 2), value), "int": jnp.arange(2), "none": None}
        state = monitor.init(grads)
        updates, _ = monitor.update(grads, state)
        assert updates["w"] is grads["w"] and updates["int"] is grads["int"]


def test_a_monitor_remembers_the_last_sizes_of_each_group():
    monitor = optax.chain(optax.identity(), telemetry.monitor(scope=scopes.leaf(), history=3))
    state = monitor.init(GRADS)
    assert {name: len(sizes) for name, sizes in telemetry.last_sizes(state).items()} == {
        "enc/w": 0,
        "head": 0,
    }
    for scale in 1.0, 2.0, jnp.nan, 0.0, 3.0, 4.0:
        _, state = monitor.update(jax.tree.map(lambda x, scale=scale: x * scale, GRADS), state)
    found = telemetry.last_sizes(state)
    np.testing.assert_allclose(found["enc/w"], [20, 15, 10], rtol=1e-6)
    np.testing.assert_allclose(found["head"], [48, 36, 24], rtol=1e-6)


def test_a_monitor_remembers_absurd_sizes_as_well():
    state = monitored(np.array([1.0, 1e30, 2.0]))
    np.testing.assert_allclose(telemetry.last_sizes(state)["tree"], [2, 1e30, 1])


def monitored(sizes, **options):
    monitor = telemetry.monitor(**options)

    def step(state, size):
        return monitor.update(jnp.full(1, size), state)[1], None

    return jax.jit(lambda sizes: jax.lax.scan(step, monitor.init(jnp.zeros(1)), sizes)[0])(
        jnp.float32(sizes)
    )


@pytest.mark.parametrize("steps, error", [(5, 1e-6), (1000, 1e-6), (5000, 0.0101)])
def test_suggestions_are_quantiles_and_multiples_of_the_mean_of_all_sizes(steps, error):
    sizes = (
        np.exp(0.7 * np.random.default_rng(steps).normal(size=steps))
        .astype(np.float32)
        .astype(float)
    )
    lines = telemetry.suggest(monitored(sizes))
    assert [line.threshold for line in lines] == sorted(line.threshold for line in lines) and len(
        lines
    ) == 9
    for line in lines:
        kind, number = (
            line.candidate.split()[::2] if "x" in line.candidate else line.candidate.split()
        )
        want = (
            np.quantile(sizes, float(number)) if kind == "quantile" else float(kind) * sizes.mean()
        )
        assert line.threshold == pytest.approx(want, rel=error)
        share = [np.mean(sizes > line.threshold * (1 + e)) for e in (-2 * error, 2 * error)]
        assert share[1] <= line.clipped_share <= share[0]
        assert line.group == "tree"


def test_suggestions_for_the_units_of_a_leaf_count_them_together():
    monitor = telemetry.monitor(scope=scopes.unit())
    _, state = monitor.update(GRADS, monitor.init(GRADS))
    found = {(line.group, line.candidate): line for line in telemetry.suggest(state)}
    assert (
        found["enc/w", "1 x mean"].threshold == 3.5
        and found["enc/w", "1 x mean"].clipped_share == 0.5
    )
    assert telemetry.last_sizes(state)["enc/w"].shape == (1, 2)


def test_without_sizes_there_is_nothing_to_suggest():
    assert telemetry.suggest(telemetry.monitor().init(GRADS)) == []
    assert telemetry.suggest(stepped(CLIP)) == [] and telemetry.last_sizes(stepped(CLIP)) == {}


@pytest.mark.parametrize("read", [telemetry.suggest, telemetry.last_sizes])
def test_the_memories_of_several_runs_are_not_mixed(read):
    monitor = telemetry.monitor()
    states = jax.vmap(lambda x: monitor.update(x, monitor.init(x))[1])(jnp.ones((3, 2)))
    with pytest.raises(
        ValueError,
        match=(
            "opt_state must be of one run, got one that is vmapped over "
            r"\(3,\); pass one of them"
        ),
    ):
        read(states)
    assert read(jax.tree.map(lambda x: x[0], states))


def test_a_memory_has_a_fixed_size():
    before, after = (
        telemetry.monitor(history=7).init(GRADS),
        stepped(telemetry.monitor(history=7), 3),
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(before, after)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(before.threshold)) == 4 * (
        7 + 1024 + 1 + 1024
    )


def test_a_memory_is_a_rule_without_a_limit():
    clip = optaxclip.clip(ranks.remember(3), scopes.tree())
    updates, state = clip.update(GRADS, clip.init(GRADS))
    chex.assert_trees_all_equal(updates, GRADS)
    assert np.isinf(state.reading.limit).all()
    with pytest.raises(ValueError, match="window must be at least 1, got 0; pass a larger count"):
        ranks.remember(0)
    with pytest.raises(TypeError, match="window must be an integer, got 2.5"):
        telemetry.monitor(history=2.5)


# The share of recent steps


def averaged(happened, decay=0.99):
    """The moving average of 0 and 1, corrected for its start, in float64."""
    average, weight, shares = 0.0, 0.0, []
    for one in happened:
        average, weight = decay * average + (1 - decay) * one, decay * weight + 1 - decay
        shares.append(average / weight)
    return shares


@pytest.mark.parametrize("share", [0.0, 0.03, 0.5, 1.0])
def test_the_recent_share_is_a_corrected_moving_average_of_what_was_clipped(share):
    clipped = np.random.default_rng(1).random(1500) < share
    clipped[-200:] = ~clipped[-200:]

    def step(state, size):
        _, state = CLIP.update(jnp.full(1, size), state)
        return state, telemetry.metrics(state)["clip/recent_share"]

    sizes = np.where(clipped, 3.0, 0.5).astype(np.float32)
    _, found = jax.jit(lambda x: jax.lax.scan(step, CLIP.init(jnp.zeros(1)), x))(sizes)
    np.testing.assert_allclose(found, averaged(clipped), atol=2e-6)
    assert (found >= 0).all() and (found <= 1).all()


@pytest.mark.parametrize(
    "scope", [scopes.tree(), BY_LAYER, scopes.leaf(), scopes.unit(), scopes.element()]
)
def test_a_step_counts_as_clipped_if_any_group_is(scope):
    clip, shares = optaxclip.clip(5.5, scope=scope), []
    state = clip.init(GRADS)
    for scale in 1.0, 0.1, jnp.nan, 0.0:  # `head` is over the limit in the first
        _, state = clip.update(jax.tree.map(lambda x, scale=scale: x * scale, GRADS), state)
        shares.append(float(state.reading.recent_share))
    np.testing.assert_allclose(shares, averaged([1, 0, 0, 0]), rtol=1e-6)


def test_seeds_have_a_recent_share_each_and_the_state_keeps_its_types():
    states = jax.vmap(lambda x: CLIP.update(x, CLIP.init(x))[1])(jnp.array([[0.1], [9.0]]))
    np.testing.assert_array_equal(telemetry.metrics(states)["clip/recent_share"], [0, 1])
    for clip in CLIP, optaxclip.clip_by_value(1.0), telemetry.monitor(), telemetry.spikes():
        before, after = clip.init(GRADS), stepped(clip, 2)
        chex.assert_trees_all_equal_shapes_and_dtypes(before, after)
        assert before.reading.recent_share.dtype == jnp.float32


# Whether this step was skipped


def test_whether_this_step_was_skipped_is_told_by_guards_in_guards():
    guard = optaxclip.skip_nonfinite(optax.chain(optaxclip.skip_spikes(CLIP, 20.0, patience=None)))
    state, skipped = guard.init(GRADS), []
    for scale in jnp.nan, 1.0, 9.0, jnp.nan, 1.0, 1.0, 9.0, 9.0, 1.0:
        _, state = guard.update(jax.tree.map(lambda x, s=scale: x * s, GRADS), state)
        skipped.append(int(telemetry.metrics(state)["clip/skipped"]))
    assert skipped == [1, 0, 1, 1, 0, 0, 1, 1, 0]
    assert telemetry.metrics(state)["clip/skipped_steps"] == sum(skipped)
    found = telemetry.metrics(guard.init(GRADS))
    assert found["clip/skipped"] == 0 and found["clip/skipped"].dtype == jnp.int32
    assert "clip/skipped" not in telemetry.metrics(stepped(CLIP))


# Labels


LABELLED = {
    "named_chain": (
        lambda: optax.named_chain(("body", CLIP), ("head", optax.chain(CLIP, optax.sgd(1.0)))),
        ["clip_body", "clip_head"],
    ),
    "two in one": (
        lambda: optax.named_chain(("body", optax.chain(CLIP, CLIP)), ("head", CLIP)),
        ["clip_body_0", "clip_body_1", "clip_head"],
    ),
    "all in one": (lambda: optax.named_chain(("x", optax.chain(CLIP, CLIP))), ["clip_0", "clip_1"]),
    "partition": (
        lambda: optax.partition(
            {"a": CLIP, "b": optaxclip.skip_nonfinite(CLIP)}, {"enc": {"w": "a"}, "head": "b"}
        ),
        ["clip_a", "clip_b"],
    ),
    "labels that are numbers": (
        lambda: optax.chain(
            optax.partition({0: CLIP, 1: CLIP}, {"enc": {"w": 0}, "head": 1}), CLIP, CLIP
        ),
        ["clip_0", "clip_1", "clip_2", "clip_3"],
    ),
    "beside one without": (
        lambda: optax.chain(CLIP, optax.named_chain(("body", CLIP))),
        ["clip", "clip_body"],
    ),
    "one of each": (
        lambda: optax.named_chain(
            ("all", optax.partition({"a": CLIP, "b": optax.sgd(1.0)}, {"enc": "a", "head": "b"})),
            ("step", telemetry.monitor()),
        ),
        ["clip", "monitor"],
    ),
    "in micro-batches and guards": (
        lambda: optax.MultiSteps(
            optaxclip.skip_nonfinite(optax.named_chain(("x", CLIP), ("y", optax.chain(CLIP)))), 1
        ),
        ["clip_x", "clip_y"],
    ),
    "one in another": (
        lambda: optax.named_chain(
            ("all", optax.partition({"a": CLIP, "b": CLIP}, {"enc": "a", "head": "b"})),
            ("step", telemetry.monitor()),
        ),
        ["clip_a", "clip_b", "monitor"],
    ),
}


def heads(found):
    return sorted(key.removesuffix("/limit") for key in found if key.endswith("/limit"))


@pytest.mark.parametrize("name", LABELLED)
def test_clips_carry_the_labels_of_their_dicts(name):
    make, expected = LABELLED[name]
    optimizer = make()
    for state in stepped(optimizer), jax.jit(lambda: stepped(optimizer))():
        assert heads(telemetry.metrics(state)) == expected
        named = [head.replace("clip", "critic") for head in expected]
        named = [head.replace("monitor", "monitor_critic") for head in named]
        assert heads(telemetry.metrics(state, prefix="critic")) == named


def test_what_holds_a_state_adds_no_label():
    state = stepped(CLIP)
    for holder in {"opt_state": state, "params": GRADS}, {"states": [state]}, (state,):
        assert heads(telemetry.metrics(holder)) == ["clip"]
    assert heads(telemetry.metrics({"critic": state, "actor": (state,)})) == [
        "clip_actor",
        "clip_critic",
    ]


# Monitors beside clips, of parameters and of ratios


def test_a_monitor_renames_nothing():
    bare = telemetry.metrics(stepped(optax.chain(CLIP, optax.sgd(1.0))))
    found = telemetry.metrics(
        stepped(optax.chain(telemetry.monitor(), CLIP, optax.sgd(1.0), telemetry.spikes()))
    )
    assert set(bare) == {key for key in found if not key.startswith("monitor")}
    assert heads(found) == ["clip", "monitor_0", "monitor_1"]
    state = stepped(telemetry.monitor())
    assert repr(state).startswith("MonitorState(step=1") and isinstance(state, optaxclip.ClipState)
    restored = flax.serialization.from_bytes(state, flax.serialization.to_bytes(state))
    assert heads(telemetry.metrics(restored)) == ["monitor"]


PARAMS = {"enc": {"w": jnp.array([[6.0, 0.0], [8.0, 0.0]])}, "head": jnp.array([24.0])}
OF = {  # of a step that is a tenth of GRADS: the sizes of `enc` and `head`
    "updates": [0.5, 1.2],
    "params": [10.0, 24.0],
    "ratio": [0.05, 0.05],
}


@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("scope", [scopes.leaf(), BY_LAYER])
@pytest.mark.parametrize("of", OF)
def test_a_monitor_is_of_updates_of_parameters_or_of_their_ratio(of, scope, jit):
    optimizer = optax.chain(optax.sgd(0.1), telemetry.monitor(of=of, scope=scope))
    update = jax.jit(optimizer.update) if jit else optimizer.update
    updates, state = update(GRADS, optimizer.init(PARAMS), PARAMS)
    chex.assert_trees_all_close(updates, jax.tree.map(lambda x: -0.1 * x, GRADS))
    (reading,) = telemetry.readings(state)
    np.testing.assert_allclose(reading.size_before, OF[of], rtol=1e-6)
    np.testing.assert_allclose(reading.size_after, OF[of], rtol=1e-6)
    last = [float(sizes[0]) for sizes in telemetry.last_sizes(state).values()]
    np.testing.assert_allclose(last, OF[of], rtol=1e-6)
    for wrapped in (
        optax.masked(optimizer, {"enc": {"w": True}, "head": False}),
        optax.chain(optaxclip.skip_nonfinite(optimizer)),
    ):
        _, state = wrapped.update(GRADS, wrapped.init(PARAMS), PARAMS)
        (reading,) = telemetry.readings(state)
        np.testing.assert_allclose(reading.size_before[0], OF[of][0], rtol=1e-6)


def test_ratios_by_unit_and_element_are_those_of_each():
    params = {"enc": {"w": jnp.array([[6.0, 9.0], [9.0, 8.0]])}, "head": jnp.array([24.0])}
    units = max(4 / np.hypot(6, 9), 5 / np.hypot(9, 8))
    grads = {"enc": {"w": jnp.array([[4.0, 0.0], [0.0, 5.0]])}, "head": jnp.array([12.0])}
    for scope, largest in (scopes.unit(), units), (scopes.element(), 4 / 6):
        monitor = telemetry.monitor(of="ratio", scope=scope)
        _, state = monitor.update(grads, monitor.init(params), params)
        np.testing.assert_allclose(state.reading.size_before, [largest, 0.5], rtol=1e-6)


def test_a_ratio_to_nothing_is_zero_and_one_to_nan_is_nan():
    monitor = telemetry.monitor(of="ratio", scope=scopes.leaf())
    params = {"a": jnp.zeros(2), "b": jnp.array([jnp.nan, 1.0]), "c": jnp.ones(2)}
    grads = {"a": jnp.ones(2), "b": jnp.ones(2), "c": jnp.array([jnp.nan, 1.0])}
    _, state = monitor.update(grads, monitor.init(params), params)
    np.testing.assert_array_equal(state.reading.size_before, [0, np.nan, np.nan])
    assert telemetry.metrics(state)["monitor/nonfinite_steps"] == 1
    assert [len(sizes) for sizes in telemetry.last_sizes(state).values()] == [0, 0, 0]


@pytest.mark.parametrize("of", ["params", "ratio"])
def test_a_monitor_of_parameters_needs_them(of):
    for monitor in telemetry.monitor(of=of), telemetry.spikes(of=of):
        with pytest.raises(
            ValueError, match=rf'of="{of}" needs the parameters, got params=None; call update\(upd'
        ):
            monitor.update(GRADS, monitor.init(GRADS))


def test_what_monitors_refuse():
    for make in telemetry.monitor, telemetry.spikes:
        with pytest.raises(
            ValueError, match="of must be one of 'updates', 'params', 'ratio', got 'grads'"
        ):
            make(of="grads")
        with pytest.raises(TypeError, match=r"got axis_name='x'; the argument is sharded_over"):
            make(axis_name="x")
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        telemetry.spikes(window=0)
    with pytest.raises(TypeError, match="window must be an integer, got 1.5"):
        telemetry.spikes(window=1.5)
    with pytest.raises(ValueError, match=r"deviations must be in \[0, inf\], got -1"):
        telemetry.spikes(-1.0)


@pytest.mark.parametrize("of", OF)
@pytest.mark.parametrize("scope", [scopes.tree(), scopes.leaf(), scopes.unit(axes=1)])
def test_monitors_of_sharded_trees_are_those_of_whole_ones(scope, of):
    sharding = jax.sharding
    mesh = jax.make_mesh((4,), ("x",), axis_types=(sharding.AxisType.Auto,))
    spec = {"w": sharding.PartitionSpec("x"), "b": sharding.PartitionSpec()}
    params = {"w": jnp.arange(1.0, 33.0).reshape(8, 4), "b": jnp.arange(3.0)}
    grads = {"w": params["w"] ** 2, "b": jnp.ones(3)}
    where = lambda path: path == "w"  # noqa: E731
    norm = norms.zeros() if of == "updates" else norms.l2()
    grads["w"] = grads["w"].at[:3].set(0.0)
    scope = scope._replace(where=where) if scope.axes is not None else scope
    over = {"w": (), "b": ()} if scope.axes is not None else None  # whole rows are on each device
    monitor = telemetry.monitor(of=of, scope=scope, norm=norm)
    mapped = telemetry.monitor(of=of, scope=scope, norm=norm, sharded_over=over)

    def run(monitor, grads, params):
        _, state = monitor.update(grads, monitor.init(params), params)
        return state.reading.size_before

    want = run(monitor, grads, params)
    placed = jax.device_put(
        (grads, params), jax.tree.map(lambda s: sharding.NamedSharding(mesh, s), (spec, spec))
    )
    np.testing.assert_allclose(jax.jit(lambda g, p: run(monitor, g, p))(*placed), want, rtol=1e-6)
    in_parts = jax.shard_map(
        lambda g, p: run(mapped, g, p),
        mesh=mesh,
        in_specs=(spec, spec),
        out_specs=sharding.PartitionSpec(),
    )
    np.testing.assert_allclose(jax.jit(in_parts)(grads, params), want, rtol=1e-6)


# Spikes


def test_spikes_are_counted_and_nothing_is_cut():
    sizes = np.float32(1 + 0.1 * np.random.default_rng(0).random(400))
    sizes[[20, 100, 300, 301]] = 50.0
    spikes = telemetry.spikes(6.0, window=128)

    def step(state, size):
        updates, state = spikes.update(jnp.full(1, size), state)
        return state, (updates[0], telemetry.metrics(state))

    _, (after, found) = jax.jit(lambda x: jax.lax.scan(step, spikes.init(jnp.zeros(1)), x))(sizes)
    np.testing.assert_array_equal(after, sizes)
    np.testing.assert_allclose(found["monitor/size_after"], sizes, rtol=1e-6)
    happened = []
    for k, size in enumerate(sizes.astype(float)):
        last = sizes[max(k - 128, 0) : k].astype(float)
        happened.append(len(last) >= 64 and size > last.mean() + 6 * last.std())
    assert np.flatnonzero(happened).tolist() == [100, 300, 301]
    np.testing.assert_array_equal(found["monitor/clipped_steps"], np.cumsum(happened))
    np.testing.assert_allclose(found["monitor/recent_share"], averaged(happened), atol=2e-6)
    assert telemetry.last_sizes(spikes.init(jnp.zeros(1))) == {}


@pytest.mark.parametrize("window", [1, 2, 5])
def test_a_short_window_begins_at_its_half(window):
    spikes = telemetry.spikes(1.0, window=window)
    state, limits = spikes.init(jnp.zeros(1)), []
    for _ in range(5):
        _, state = spikes.update(jnp.ones(1), state)
        limits.append(bool(np.isfinite(state.reading.limit[0])))
    assert limits.index(True) == (window + 1) // 2


def test_nan_passes_spikes_and_is_counted():
    spikes = telemetry.spikes()
    grads = jnp.array([jnp.nan, 1.0])
    updates, state = spikes.update(grads, spikes.init(grads))
    assert updates is grads and telemetry.metrics(state)["monitor/nonfinite_steps"] == 1


# Forgetting what was learned


def test_a_clip_forgets_what_it_learned_by_the_line_in_the_documentation():
    optimizer = optax.chain(optaxclip.skip_nonfinite(optax.chain(optaxclip.autoclip(), CLIP)))
    state, fresh = stepped(optimizer, 3), optimizer.init(GRADS)

    def is_clip(node):
        return isinstance(node, optaxclip.ClipState)

    state = jax.tree.map(
        lambda old, new: new if is_clip(new) else old, state, fresh, is_leaf=is_clip
    )
    assert telemetry.metrics(state)["clip_0/steps"] == 0
    chex.assert_trees_all_equal(state[0].inner, fresh[0].inner)
    assert state[0].steps == 3
