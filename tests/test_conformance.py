"""What Optax's own suites ask of an Optax transform holds for every transform of ours, with and
without its record.
"""

import copy
import functools
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization, traverse_util
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from transforms import CASES, KEEPERS, SCALERS

import optaxclip
from optaxclip import norms, scopes, telemetry, thresholds

PARAMS = {"kernel": jnp.linspace(-1.0, 1.0, 32).reshape(8, 4), "bias": jnp.linspace(0.5, 2.0, 8)}
GRADS = jax.tree.map(lambda x: 3 * x[::-1], PARAMS)

BY_NAME = {"bias": 1.0, "kernel": thresholds.ema()}
# Every public transform. Those of the contract, with the names they have there and a limit that
# clips; then all else.
TRANSFORMS = {
    f"{case.name} {k}": functools.partial(case.make, 1.0)
    for k, case in enumerate([*CASES, *SCALERS, *KEEPERS])
}
TRANSFORMS |= {
    "ema by element": lambda **o: optaxclip.clip(
        thresholds.ema(), scopes.element(), norm=norms.linf(), **o
    ),
    "zscore by unit": lambda **o: optaxclip.clip(thresholds.zscore(), scopes.unit(), **o),
    "quantile by unit": lambda **o: optaxclip.clip(
        thresholds.quantile(0.5, window=3), scopes.unit(), **o
    ),
    "dict by group": lambda **o: optaxclip.clip(BY_NAME, scopes.group(lambda path: path), **o),
    "dict by unit": lambda **o: optaxclip.clip(BY_NAME, scopes.unit(), **o),
    "error_feedback": lambda **o: optaxclip.error_feedback(optaxclip.clip_by_norm(1.0, **o)),
    "carry around a rule": lambda **o: optaxclip.error_feedback(
        optaxclip.spam_clip(**o), decay=0.5
    ),
    "chain": lambda **o: optax.chain(optaxclip.adagc(**o), optaxclip.spam_clip(**o)),
    "skip_nonfinite": lambda **o: optaxclip.skip_nonfinite(optaxclip.clip_by_global_norm(1.0, **o)),
    "skip_spikes": lambda **o: optaxclip.skip_spikes(
        optax.chain(optaxclip.spam_clip(**o), optax.adam(0.1)), 5.0
    ),
}
MONITORS = {
    "monitor": telemetry.monitor,
    "monitor by element": functools.partial(
        telemetry.monitor, scope=scopes.element(), norm=norms.linf(), history=3
    ),
}
RECORDED = [
    (name, make, {"record": record})
    for name, make in TRANSFORMS.items()
    for record in (True, False)
]
ALL = [*RECORDED, *((name, make, {}) for name, make in MONITORS.items())]
NAMES = [
    f"{name}{'' if options.get('record', True) else ' without record'}" for name, _, options in ALL
]
each_recording = pytest.mark.parametrize("name", [*TRANSFORMS, *MONITORS])


def named(name):
    return {**TRANSFORMS, **MONITORS}[name]()


# How many trees like the parameters a state has: a buffer for each is sharded as they are. None for
# what is not listed.
PARAMETER_SHAPED = {
    "scale_by_stable_adam": 2,  # the moments of Adam
    "error_feedback": 1,
    "spam_clip": 1,
    "keep_params": 1,
    "chain": 1,
    "skip_spikes": 3,
    "ema by element": 4,  # the average and its count; the usual size, and how often another came
    "zscore by unit": 5,
    "quantile by unit": 4,
    "monitor by element": 4,
    "carry around a rule": 2,
}


def shaped_like_parameters(name):
    return PARAMETER_SHAPED.get(name, PARAMETER_SHAPED.get(name.split()[0], 0))


def mark(opt, state):
    """The state, with the shape of the parameter at each leaf that Optax takes for one of its
    buffers, and None at others.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), PARAMS)
    return optax.tree.map_params(
        opt, lambda x, like: (x, like), state, shapes, transform_non_params=lambda x: (x, None)
    )


def is_marked(x):
    return (
        type(x) is tuple
        and len(x) == 2
        and (x[1] is None or isinstance(x[1], jax.ShapeDtypeStruct))
    )


def test_every_public_transform_is_in_the_table():
    makers = {
        name
        for name in optaxclip.__all__
        if callable(getattr(optaxclip, name)) and not isinstance(getattr(optaxclip, name), type)
    }
    # the last two are no transforms; qk_clip needs the logits of a model: test_qk_clip.py
    listed = {name.split()[0] for name in TRANSFORMS} | {
        "qk_clip",
        "clip_cotangent",
        "clip_activation_grad",
    }
    assert makers <= listed, makers - listed


@pytest.mark.parametrize("name, make, options", ALL, ids=NAMES)
def test_trees_like_the_parameters_are_found_and_all_else_are_other_arrays(name, make, options):
    opt = make(**options)
    state = opt.init(PARAMS)
    marks = jax.tree.leaves(mark(opt, state), is_leaf=is_marked)
    assert len(marks) == len(jax.tree.leaves(state)) and all(
        isinstance(x, jax.Array) for x, _ in marks
    )
    found = [(x, like) for x, like in marks if like is not None]
    assert len(found) == 2 * shaped_like_parameters(name)
    for (
        x,
        like,
    ) in found:  # statistics of units broadcast against the parameter; a window stands in front
        assert np.broadcast_shapes(x.shape[x.ndim - len(like.shape) :], like.shape) == like.shape


@pytest.mark.parametrize("name, make, options", ALL, ids=NAMES)
def test_a_state_that_was_mapped_goes_on(name, make, options):
    opt = make(**options)
    state = opt.init(PARAMS)
    mapped = optax.tree.map_params(opt, lambda x: x, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    assert jax.tree.structure(jax.eval_shape(opt.init, PARAMS)) == jax.tree.structure(state)
    chex.assert_trees_all_equal(mapped, state)
    after, expected = (
        jax.eval_shape(opt.update, GRADS, start, PARAMS)[1] for start in (mapped, state)
    )
    # names are known again
    assert repr(jax.tree.structure(after)) == repr(jax.tree.structure(expected))


@pytest.mark.parametrize("name, make, options", ALL, ids=NAMES)
def test_a_state_goes_through_every_way_to_save_it(name, make, options):
    state = make(**options).init(PARAMS)
    assert all(x is not None for x in jax.tree.leaves(state, is_leaf=lambda x: x is None))
    flat = traverse_util.flatten_dict(
        serialization.to_state_dict(state), sep="/", keep_empty_nodes=True
    )
    nested = traverse_util.unflatten_dict(flat, sep="/")
    ways = {
        "flat": serialization.from_state_dict(state, nested),
        "msgpack": serialization.from_bytes(state, serialization.to_bytes(state)),
        "pickle": pickle.loads(pickle.dumps(state)),
        "copy": copy.deepcopy(state),
    }
    for way, restored in ways.items():
        assert jax.tree.structure(restored) == jax.tree.structure(state), way
        assert repr(jax.tree.structure(restored)) == repr(jax.tree.structure(state)), way
        assert group_names(restored) == group_names(state), way
        chex.assert_trees_all_equal(restored, state)


def group_names(state):
    return [telemetry.group_names(reading) for reading in telemetry.readings(state)]


def test_statistics_of_fp8_that_stand_beside_gradients_are_left_alone():
    grads = {
        "params": GRADS,
        "_overwrite_with_gradient": {"amax_history": jnp.full(4, jnp.inf), "scale": jnp.ones(())},
    }
    for name, make in TRANSFORMS.items():
        if "dict" not in name and name != "skip_spikes":  # which skips all of this step
            out, _ = make().update(grads, make().init(grads), grads)
            chex.assert_trees_all_equal(
                out["_overwrite_with_gradient"], grads["_overwrite_with_gradient"]
            )
            chex.assert_tree_all_finite(out["params"])


def described(tree):
    return jax.tree.structure(tree), [
        (x.shape, x.dtype, x.weak_type) for x in map(jax.typeof, jax.tree.leaves(tree))
    ]


@pytest.mark.parametrize("name, make, options", ALL, ids=NAMES)
def test_one_trace_serves_five_steps_with_donated_states(name, make, options):
    opt, traces = make(**options), []

    @functools.partial(jax.jit, donate_argnums=1)
    def step(grads, state, params):
        traces.append(1)
        updates, state = opt.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state, params = jax.jit(opt.init)(PARAMS), PARAMS
    for _ in range(5):
        before = described(state)
        params, state = step(GRADS, state, params)
        assert described(state) == before
    assert len(traces) == 1


# Wrappers of Optax that leave a transform what it is, one inside of the other because each alone
# takes a program of its own, and those that make something else of it.
EQUAL = {
    "named_chain": lambda opt: optax.named_chain(("clip", opt)),
    "masked": lambda opt: optax.masked(opt, dict.fromkeys(PARAMS, True)),
    "partition": lambda opt: optax.partition({"all": opt}, dict.fromkeys(PARAMS, "all")),
    "MultiSteps": lambda opt: optax.MultiSteps(opt, 1),
    "apply_if_finite": lambda opt: optax.apply_if_finite(opt, 3),
    "conditionally_transform": lambda opt: optax.conditionally_transform(
        opt, lambda step: step >= 0
    ),
    "conditionally_mask": lambda opt: optax.conditionally_mask(opt, lambda step: step >= 0),
}
NESTED = {
    "of trees": ["named_chain", "masked", "partition"],
    "of steps": ["MultiSteps", "apply_if_finite", "conditionally_transform", "conditionally_mask"],
}
OTHERS = {
    "flatten": optax.flatten,
    "lookahead": lambda opt: optax.lookahead(optax.chain(opt, optax.sgd(0.1)), 2, 0.5),
    "schedule_free": lambda opt: optax.contrib.schedule_free(optax.chain(opt, optax.sgd(0.1)), 0.1),
    "mechanize": lambda opt: optax.contrib.mechanize(optax.chain(opt, optax.sgd(0.1))),
    "sam": lambda opt: optax.contrib.sam(
        optax.chain(opt, optax.sgd(0.1)), optax.sgd(0.05), sync_period=2
    ),
}


def nested(opt, wrappers):
    for wrapper in reversed(wrappers):
        opt = EQUAL[wrapper](opt)
    return opt


def in_a_loop(opt, params):
    """Parameters after a few steps, in a loop that asks for the same state at every step."""

    def step(carry, scale):
        params, state = carry
        grads = jax.tree.map(lambda x: scale * x, GRADS)
        if isinstance(params, optax.LookaheadParams):
            grads = grads if not isinstance(grads, optax.LookaheadParams) else grads.fast
        updates, state = opt.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, state), _ = jax.lax.scan(step, (params, opt.init(params)), jnp.array([1.0, 0.5, 2.0]))
    return params, telemetry.metrics(state)


@each_recording
def test_wrappers_of_optax_work_with_every_transform(name):
    opt = named(name)
    # no names
    others_here = {
        wrapper: wrap
        for wrapper, wrap in OTHERS.items()
        if wrapper != "flatten" or "dict" not in name
    }

    @jax.jit
    def run():
        same = {
            words: in_a_loop(nested(opt, wrappers), PARAMS) for words, wrappers in NESTED.items()
        }
        others = {
            wrapper: in_a_loop(wrap(opt), PARAMS)
            for wrapper, wrap in others_here.items()
            if wrapper != "lookahead"
        }
        others["lookahead"] = in_a_loop(
            OTHERS["lookahead"](opt), optax.LookaheadParams.init_synced(PARAMS)
        )
        return in_a_loop(opt, PARAMS), same, others

    assert sorted(sum(NESTED.values(), [])) == sorted(EQUAL)
    (expected, numbers), same, others = run()
    for wrapper, (params, found) in same.items():
        # sums of steps near 1
        chex.assert_trees_all_close(params, expected, rtol=1e-6, atol=1e-6, custom_message=wrapper)
        if name not in ("chain", "skip_nonfinite", "skip_spikes"):
            chex.assert_trees_all_close(found, numbers, rtol=1e-6, custom_message=wrapper)
    for wrapper, (params, found) in others.items():
        chex.assert_tree_all_finite(params)
        # what a clip saw is found inside of any wrapper
        assert bool(found) == bool(numbers), wrapper


# A trainer that infers how to shard the state of an optimizer from how its parameters are


SPECS = {"kernel": P("fsdp", "tp"), "bias": P("tp")}


@each_recording
def test_a_trainer_infers_the_sharding_of_the_state(name):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"))
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), SPECS, is_leaf=lambda x: isinstance(x, P)
    )
    opt = optax.chain(named(name), optax.adam(0.1))
    abstract = jax.eval_shape(opt.init, PARAMS)
    whole = NamedSharding(mesh, P())

    def like_parameter(x, sharding):  # statistics of units, and windows, have other shapes
        return sharding if x.shape in ((8, 4), (8,)) else whole

    of_state = optax.tree.map_params(
        opt, like_parameter, abstract, shardings, transform_non_params=lambda _: whole
    )
    assert jax.tree.structure(of_state) == jax.tree.structure(abstract)

    def step(grads, state, params):
        updates, state = opt.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    with jax.set_mesh(mesh):
        params, grads = jax.device_put((PARAMS, GRADS), (shardings, shardings))
        state = jax.jit(opt.init, out_shardings=of_state)(params)
        sharded = jax.jit(step, out_shardings=(shardings, of_state), donate_argnums=1)
        for _ in range(2):
            params, state = sharded(grads, state, params)
    expected, alone = PARAMS, opt.init(PARAMS)
    for _ in range(2):
        expected, alone = jax.jit(step)(GRADS, alone, expected)
    chex.assert_trees_all_close(params, expected, rtol=1e-5, atol=1e-6)
    jax.tree.map(
        lambda x, sharding: np.testing.assert_(x.sharding.is_equivalent_to(sharding, x.ndim)),
        state,
        of_state,
    )


@each_recording
def test_a_state_is_made_on_an_explicit_mesh_without_a_context(name):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"))
    params = {
        name: jax.device_put(x, NamedSharding(mesh, SPECS[name])) for name, x in PARAMS.items()
    }
    opt = named(name)
    state = opt.init(params)
    for x, like in jax.tree.leaves(mark(opt, state), is_leaf=is_marked):
        if like is not None and x.shape == like.shape:
            assert x.sharding == params["kernel" if x.ndim == 2 else "bias"].sharding
    chex.assert_trees_all_equal(
        jax.tree.map(np.asarray, state), jax.tree.map(np.asarray, opt.init(PARAMS))
    )
