"""However the updates are split over devices, they are clipped as if they were whole."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from transforms import CASES, SCALERS

import optaxclip
from optaxclip import (
    norms,
    per_example,
    responses,
    scopes,
    skip_nonfinite,
    skip_spikes,
    telemetry,
    thresholds,
)
from optaxclip._measure import measure

SHAPES = {"both": (8, 4), "one": (3, 4), "vector": (8,), "whole": (2, 3), "scalar": ()}
SPECS = {"both": P("x", "y"), "one": P(None, "y"), "vector": P("x"), "whole": P(), "scalar": P()}
SPLIT = {"both": ("x", "y"), "one": "y", "vector": ("x",), "whole": (), "scalar": ()}
# along which the numbers of a unit are split
FAN_IN = {
    "both": "x",
    "one": (),
    "vector": "x",
    "whole": (),
    "scalar": (),
}
TRANSFORMS = CASES + SCALERS
each_transform = pytest.mark.parametrize(
    "case", TRANSFORMS, ids=[f"{case.name}-{i}" for i, case in enumerate(TRANSFORMS)]
)
STEPS = 3


def normal_tree(seed, *leading):
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    return {
        n: jax.random.normal(key, (*leading, *shape))
        for key, (n, shape) in zip(keys, SHAPES.items(), strict=True)
    }


GRADS, PARAMS = normal_tree(0, STEPS), normal_tree(100)


def mesh(kind=AxisType.Auto):
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))


def steps(transform):
    """Some steps in a scan: the last updates, and every reading."""

    def run(grads, params):
        def step(state, g):
            updates, state = transform.update(g, state, params)
            return state, updates

        state, updates = jax.lax.scan(step, transform.init(params), grads)
        return updates, [
            (reading.measured, reading.counted) for reading in telemetry.readings(state)
        ]

    return run


@functools.cache
def whole(i):
    return jax.device_get(jax.jit(steps(TRANSFORMS[i].make(1.0)))(GRADS, PARAMS))


def each_step(specs):
    return {name: P(None, *spec) for name, spec in specs.items()}


def placed(run, where):
    """`run` under `jit` on arguments that lie on the mesh."""

    def on(specs):
        return {name: NamedSharding(where, spec) for name, spec in specs.items()}

    return jax.jit(run)(*jax.device_put((GRADS, PARAMS), (on(each_step(SPECS)), on(SPECS))))


def mapped(run, **options):
    """`run` in `shard_map`."""
    specs = (each_step(SPECS), SPECS)
    return jax.jit(
        jax.shard_map(run, mesh=mesh(), in_specs=specs, out_specs=(specs[0], P()), **options)
    )(GRADS, PARAMS)


def assert_same(found, want):
    chex.assert_trees_all_close(jax.device_get(found), want, rtol=1e-5, atol=1e-6)


def make(case, **options):
    return steps(case.make(1.0, **options))


@each_transform
def test_under_jit(case):
    assert_same(placed(make(case), mesh()), whole(TRANSFORMS.index(case)))


@each_transform
def test_on_an_explicit_mesh(case):
    assert_same(placed(make(case), mesh(AxisType.Explicit)), whole(TRANSFORMS.index(case)))


@pytest.mark.parametrize("name", ["adagc", "adaptive_grad_clip", "clip_by_value"])
def test_on_an_explicit_mesh_that_is_the_context_too(name):
    i, case = next((i, case) for i, case in enumerate(TRANSFORMS) if case.name == name)
    where = mesh(AxisType.Explicit)
    with jax.sharding.use_mesh(where) if hasattr(jax.sharding, "use_mesh") else jax.set_mesh(where):
        assert_same(placed(make(case), where), whole(i))


@each_transform
def test_in_shard_map_the_types_tell(case):
    if case.name == "spectral_clip":
        with pytest.raises(
            ValueError,
            match=(
                "updates has at 'both' a matrix that is split along .*; clip under jit, or gather"
            ),
        ):
            mapped(make(case))
    elif case.name == "adaptive_grad_clip":
        words = (
            "sharded_over must be given for a scope finer than a leaf, where a leaf of "
            r"shape \(2, 2\) is split along"
        )
        with pytest.raises(ValueError, match=words):
            mapped(make(case))
        assert_same(mapped(make(case, sharded_over=FAN_IN)), whole(TRANSFORMS.index(case)))
    else:
        assert_same(mapped(make(case)), whole(TRANSFORMS.index(case)))


@each_transform
def test_in_shard_map_without_types_the_names_tell(case):
    if case.name == "spectral_clip":
        with pytest.raises(ValueError, match="matrix that is split"):
            mapped(make(case, sharded_over=SPLIT), check_vma=False)
        return
    if case.name not in (
        "clip_by_value",
        "error_feedback",
        "spam_clip",
    ):  # elements are measured where they are
        with pytest.raises(
            ValueError,
            match=(
                "sharded_over must be given where JAX does not track what differs between devices"
            ),
        ):
            mapped(make(case), check_vma=False)
    names = FAN_IN if case.name == "adaptive_grad_clip" else SPLIT
    assert_same(
        mapped(make(case, sharded_over=names), check_vma=False), whole(TRANSFORMS.index(case))
    )


# What is special


def in_parts(run, in_specs, *args, **options):
    """`run` in `shard_map` on a mesh of 4; it returns what is the same on all devices, if nothing
    else is said.
    """
    where = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    return jax.jit(
        jax.shard_map(run, mesh=where, in_specs=in_specs, **{"out_specs": P(), **options})
    )(*args)


def test_a_leaf_that_every_device_has_counts_once_in_its_group():
    by_name = scopes.group(lambda path: path[0])
    grads = {
        "a_split": jnp.full(16, 0.5),
        "a_whole": jnp.array([3.0]),
        "b_whole": jnp.array([4.0]),
        "c_split": jnp.ones(4),
    }
    specs = {"a_split": P("x"), "a_whole": P(), "b_whole": P(), "c_split": P("x")}
    for norm, want in (
        (norms.l2(), [np.sqrt(13), 4, 2]),
        (norms.linf(), [3, 4, 1]),
        (norms.lp(3), [(2 + 27) ** (1 / 3), 4, 4 ** (1 / 3)]),
    ):
        clip = optaxclip.clip(1.0, scope=by_name, norm=norm)
        sizes = in_parts(
            lambda g, clip=clip: clip.update(g, clip.init(g))[1].reading.size_before,
            (specs,),
            grads,
        )
        np.testing.assert_allclose(sizes, want, rtol=1e-6)


def test_one_choice_of_names_holds_for_a_part_of_the_tree():
    clip = optaxclip.clip_by_norm(1.0, sharded_over={"split": "x", "whole": ()})
    grads = {
        "split": {"v": jnp.ones(8), "w": jnp.full(4, 2.0)},
        "whole": [jnp.array([3.0]), jnp.array([4])],
    }
    sizes = in_parts(
        lambda g: clip.update(g, clip.init(g))[1].reading.size_before,
        ({"split": P("x"), "whole": P()},),
        grads,
        check_vma=False,
    )
    np.testing.assert_allclose(sizes, [np.sqrt(8), 4, 3], rtol=1e-6)
    with pytest.raises(
        ValueError,
        match=r"sharded_over must be names of mapped axes or a tree of them .*, got \{'split': 'x'",
    ):
        clip.init({"split": jnp.ones(1)})
    with pytest.raises(
        ValueError, match="sharded_over must be names of mapped axes or a tree of them"
    ):
        clip.init(jnp.ones(1))


@pytest.mark.parametrize("sharded_over", ["x", ("x",), {"w": "x", "b": "x"}])
def test_the_mapped_axis_of_vmap_is_named(sharded_over):
    grads = {"w": jnp.arange(8.0).reshape(4, 2), "b": jnp.ones((4, 1))}
    clip = optaxclip.clip_by_global_norm(1.0, sharded_over=sharded_over)
    updates = jax.vmap(lambda g: clip.update(g, clip.init(g))[0], axis_name="x")(grads)
    want = optaxclip.clip_by_global_norm(1.0)
    chex.assert_trees_all_close(updates, want.update(grads, want.init(grads))[0], rtol=1e-6)


def test_pmap_is_told_what_is_split():
    grads = jnp.arange(1.0, 9.0).reshape(4, 2)

    def run(sharded_over):
        clip = optaxclip.clip_by_global_norm(1.0, sharded_over=sharded_over)
        return jax.pmap(
            lambda g: clip.update(g, clip.init(g))[0], axis_name="x", devices=jax.devices()[:4]
        )(grads)

    np.testing.assert_allclose(run("x"), grads / np.linalg.norm(grads), rtol=1e-6)
    np.testing.assert_allclose(
        run(()), grads / np.linalg.norm(grads, axis=1, keepdims=True), rtol=1e-6
    )


def test_names_leave_out_what_the_types_know_to_be_whole():
    clip = optaxclip.clip_by_global_norm(1.0, sharded_over="x")
    grads = {"split": jnp.ones(4), "whole": jnp.array([3.0])}
    size = in_parts(
        lambda g: clip.update(g, clip.init(g))[1].reading.size_before,
        ({"split": P("x"), "whole": P()},),
        grads,
    )
    np.testing.assert_allclose(size, [np.sqrt(13)], rtol=1e-6)


def test_on_purpose_each_device_clips_its_own():
    clip = optaxclip.clip_by_global_norm(1.0, sharded_over=())
    grads = jnp.arange(1.0, 9.0)
    updates = in_parts(
        lambda g: clip.update(g, None)[0], (P("x"),), grads, out_specs=P("x")
    ).reshape(4, 2)
    np.testing.assert_allclose(np.linalg.norm(updates, axis=1), 1, rtol=1e-6)


def test_examples_mapped_within_a_device_are_each_clipped_alone():
    clip = optaxclip.clip_by_global_norm(1.0)
    grads = jnp.arange(1.0, 25.0).reshape(3, 8)  # three examples, parameters split in four
    updates = in_parts(
        jax.vmap(lambda g: clip.update(g, None)[0]), (P(None, "x"),), grads, out_specs=P(None, "x")
    )
    np.testing.assert_allclose(
        updates, grads / np.linalg.norm(grads, axis=1, keepdims=True), rtol=1e-6
    )


@pytest.mark.parametrize(
    "sizes",
    [
        [3e38, 0, 0, 0],
        [2e38, 2e38, 1e38, 0],
        [1e-25, 0, 1e-25, 0],
        [2e8, 2e8, 2e8, 2e8],
        [1e20, 1, 1, 1],
    ],
)
@pytest.mark.parametrize("norm", [norms.l2(), norms.rms(), norms.lp(3)], ids=["l2", "rms", "lp"])
def test_the_norm_of_parts_is_true_where_squares_are_no_floats(norm, sizes):
    found = in_parts(lambda x: measure(norm, [x])[0], (P("x"),), jnp.array(sizes, jnp.float32))
    np.testing.assert_allclose(found, measure(norm, [jnp.array(sizes, jnp.float32)])[0], rtol=1e-6)


@pytest.mark.parametrize("norm", [norms.l2(), norms.linf(), norms.lp(3)], ids=["l2", "linf", "lp"])
def test_derivatives_go_through_the_norm_of_parts(norm):
    clip = optaxclip.clip(1.0, scopes.tree(), norm=norm)
    x = jnp.array([1.0, -2.0, 3.0, 0.5])

    def loss(x, reduce):
        return reduce(jnp.sum(clip.update(x, None)[0] ** 3))

    found = in_parts(
        jax.grad(lambda x: loss(x, lambda y: jax.lax.psum(y, "x"))), (P("x"),), x, out_specs=P("x")
    )
    np.testing.assert_allclose(
        found, jax.grad(lambda x: loss(x, lambda y: y))(x), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("bad", [0, 3])
@pytest.mark.parametrize("checked", [True, False])
def test_a_bad_gradient_on_one_device_is_skipped_by_all(bad, checked):
    sharded_over = None if checked else {"split": "x", "whole": ()}
    guards = [
        skip_nonfinite(optax.adam(1.0), sharded_over=sharded_over),
        skip_spikes(optax.adam(1.0), thresholds.ema(5.0, warmup=1), sharded_over=sharded_over),
        skip_spikes(
            optax.adam(1.0),
            {"norm": thresholds.ema(5.0, warmup=1), "loss": thresholds.zscore(4.0)},
            watch="both",
            where=lambda path: path == "split",
            sharded_over=sharded_over,
        ),
    ]
    grads = {
        "split": jnp.ones((3, 8)).at[1, 2 * bad].set(jnp.nan).at[2, 2 * bad].set(100.0),
        "whole": jnp.ones((3, 2)),
    }
    specs = {"split": P(None, "x"), "whole": P()}

    def run(guard, g):
        state = guard.init(jax.tree.map(lambda x: x[0], g))
        state, updates = jax.lax.scan(
            lambda state, g: guard.update(g, state, value=-1.0)[::-1], state, g
        )
        return updates, state.skipped_steps, state.consecutive

    spikes = [True, False, False]
    for guard, done in zip(guards, ([True, False, True], spikes, spikes), strict=True):
        updates, skipped, _ = in_parts(
            functools.partial(run, guard),
            (specs,),
            grads,
            out_specs=(specs, P(), P()),
            check_vma=checked,
        )
        assert skipped == done.count(False)
        for leaf in updates.values():
            np.testing.assert_array_equal(np.any(leaf != 0, axis=1), done)
            np.testing.assert_array_equal(np.all(leaf != 0, axis=1), done)


def test_a_loss_that_differs_between_devices_is_refused():
    guard = skip_spikes(optax.sgd(1.0), 1.0, watch="loss")

    def run(x, reduce):
        return guard.update(x, guard.init(x), value=reduce(jnp.sum(x)))[1].skipped_steps

    with pytest.raises(
        ValueError,
        match=(
            "value must be the same on all devices, got one that varies along "
            r"\('x',\); pass jax.lax.pmean"
        ),
    ):
        in_parts(lambda x: run(x, lambda loss: loss), (P("x"),), jnp.ones(4))
    assert (
        in_parts(
            lambda x: run(x, lambda loss: jax.lax.pmean(loss, "x")), (P("x"),), jnp.full(4, 2.0)
        )
        == 1
    )


def test_a_monitor_sees_the_whole():
    monitor = telemetry.monitor(sharded_over="x")
    state = in_parts(
        lambda x: monitor.update(x, monitor.init(x))[1].reading.size_before,
        (P("x"),),
        jnp.ones(16),
        check_vma=False,
    )
    np.testing.assert_allclose(state, [4.0])


# Maps inside of maps: seeds on top of parts, each clipped by its own whole norm

SEEDS = 3
SEEDED = {
    "split": jnp.arange(1.0, 49.0).reshape(SEEDS, 8, 2),
    "whole": jnp.arange(9.0).reshape(SEEDS, 3) - 4,
}
PARTS = {"split": P(None, "x"), "whole": P()}


def clipped_once(sharded_over=None):
    clip = optaxclip.clip_by_global_norm(1.0, sharded_over=sharded_over)
    return lambda grads: clip.update(grads, None)[0]


def assert_each_seed(found):
    seeds = [jax.tree.map(lambda x, i=i: x[i], SEEDED) for i in range(SEEDS)]
    want = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(jax.jit(clipped_once()), seeds))
    chex.assert_trees_all_close(jax.device_get(found), jax.device_get(want), rtol=1e-6)


@pytest.mark.parametrize("checked", [True, False])
def test_seeds_within_shard_map(checked):
    run = jax.vmap(clipped_once(None if checked else {"split": "x", "whole": ()}))
    assert_each_seed(in_parts(run, (PARTS,), SEEDED, out_specs=PARTS, check_vma=checked))


def test_shard_map_within_seeds():
    parts = {"split": P("x"), "whole": P()}
    assert_each_seed(
        jax.vmap(lambda grads: in_parts(clipped_once(), (parts,), grads, out_specs=parts))(SEEDED)
    )


def test_seeds_and_rows_both_by_vmap():
    clip = clipped_once({"split": "rows", "whole": ()})
    rows, rows_of_seeds = {"split": 0, "whole": None}, {"split": 1, "whole": None}
    assert_each_seed(jax.jit(jax.vmap(jax.vmap(clip, (rows,), rows, axis_name="rows")))(SEEDED))
    assert_each_seed(
        jax.jit(jax.vmap(jax.vmap(clip), (rows_of_seeds,), rows_of_seeds, axis_name="rows"))(SEEDED)
    )


def test_seeds_within_pmap():
    in_axes = {"split": 1, "whole": None}
    grads = {"split": SEEDED["split"].reshape(SEEDS, 4, 2, 2), "whole": SEEDED["whole"]}
    run = jax.vmap(clipped_once({"split": "x", "whole": ()}))
    found = jax.pmap(run, "x", in_axes=(in_axes,), out_axes=in_axes, devices=jax.devices()[:4])(
        grads
    )
    assert_each_seed({"split": found["split"].reshape(SEEDS, 8, 2), "whole": found["whole"]})


# Inside the backward pass

FACTORS = jnp.arange(1.0, 17.0).reshape(8, 2)


def slope(clip, factors, x, total=jnp.sum):
    """The derivative of a sum of products, clipped on its way back."""
    return jax.grad(lambda x: total(factors * clip(x)))(x)


@pytest.mark.parametrize("each_row", [False, True])
def test_cotangents_under_jit(each_row):
    whole = functools.partial(optaxclip.clip_cotangent, threshold=1.0)
    clip = jax.vmap(whole) if each_row else whole
    rows = NamedSharding(mesh(), P("x", "y"))
    found = jax.jit(functools.partial(slope, clip), in_shardings=(rows, rows))(
        FACTORS, jnp.ones((8, 2))
    )
    want = FACTORS / jnp.linalg.norm(FACTORS, axis=-1 if each_row else None, keepdims=True)
    np.testing.assert_allclose(found, want, rtol=1e-6)


def test_cotangents_in_shard_map():
    def sum_over_all(x):
        return jax.lax.psum(jnp.sum(x), "x")

    clip = functools.partial(optaxclip.clip_cotangent, threshold=1.0)
    run = functools.partial(slope, clip)
    want = FACTORS / jnp.linalg.norm(FACTORS)
    for total in jnp.sum, sum_over_all:
        found = in_parts(
            functools.partial(run, total=total),
            (P("x"), P("x")),
            FACTORS,
            jnp.ones((8, 2)),
            out_specs=P("x"),
        )
        np.testing.assert_allclose(found, want, rtol=1e-6)
    # one x for all
    same = in_parts(
        functools.partial(run, total=sum_over_all), (P("x"), P()), FACTORS, jnp.ones((2, 2))
    )
    summed = FACTORS.reshape(4, 2, 2).sum(0)
    np.testing.assert_allclose(same, summed / jnp.linalg.norm(summed), rtol=1e-6)
    each = functools.partial(clip, scope=scopes.element(), response=responses.clamp)
    found = in_parts(
        functools.partial(slope, each),
        (P("x"), P("x")),
        0.3 * FACTORS,
        jnp.ones((8, 2)),
        out_specs=P("x"),
    )
    np.testing.assert_allclose(found, jnp.minimum(0.3 * FACTORS, 1), rtol=1e-6)


@pytest.mark.parametrize("checked", [True, False])
def test_cotangents_of_examples_in_shard_map(checked):
    clip = jax.vmap(functools.partial(optaxclip.clip_cotangent, threshold=1.0, sharded_over=()))
    run, rows = functools.partial(slope, clip), (P("x"), P("x"))
    found = in_parts(run, rows, FACTORS, jnp.ones((8, 2)), out_specs=P("x"), check_vma=checked)
    np.testing.assert_allclose(
        found, FACTORS / jnp.linalg.norm(FACTORS, axis=-1, keepdims=True), rtol=1e-6
    )


# Examples that are split over devices

WEIGHTS = {"w": jnp.arange(12.0).reshape(4, 3) / 10 - 0.5, "b": jnp.zeros(3)}
ROWS = jax.random.normal(jax.random.key(2), (16, 4)).at[5].set(jnp.nan)
PRESENT = jnp.arange(16) % 7 != 3


def loss(params, x):
    return jnp.sum(jnp.tanh(x @ params["w"] + params["b"]) ** 2)


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("microbatch", [None, 2])
@pytest.mark.parametrize(
    "threshold", [0.3, per_example.quantile(0.5, noise=1.0)], ids=["number", "rule"]
)
def test_gradients_of_examples_in_shard_map(threshold, microbatch, checked):
    def run(params, x, mask, **options):
        (value, seen), gradients = per_example.clipped_grad(loss, threshold, **options)(
            params, x, mask=mask
        )
        return (value, gradients, seen.dropped, seen.state), seen.sizes

    split = functools.partial(run, sharded_over="x", microbatch=microbatch)
    specs = (P(), P("x"), P("x"))
    found = in_parts(
        split, specs, WEIGHTS, ROWS, PRESENT, out_specs=(P(), P("x")), check_vma=checked
    )
    chex.assert_trees_all_close(
        jax.device_get(found), jax.device_get(run(WEIGHTS, ROWS, PRESENT)), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("checked", [True, False])
def test_given_gradients_of_examples_in_shard_map(checked):
    def run(gradients, **options):
        clip = per_example.aggregate(1.0, **options)
        return clip.update(gradients, clip.init(jnp.zeros(4)))

    found = in_parts(functools.partial(run, sharded_over="x"), (P("x"),), ROWS, check_vma=checked)
    chex.assert_trees_all_close(
        jax.device_get(found), jax.device_get(run(ROWS)), rtol=1e-5, atol=1e-6
    )


def test_examples_in_shard_map_are_clipped_by_leaves_or_more():
    clip = per_example.aggregate(1.0, scope=scopes.unit(), sharded_over="x")
    with pytest.raises(
        ValueError,
        match=r"scope must not be finer than a leaf in a shard_map or pmap over \('x',\)",
    ):
        in_parts(lambda x: clip.update(x, None)[0], (P("x"),), ROWS)


# What is made before there are any mapped axes


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("make", [optaxclip.clip_by_global_norm, optaxclip.adaptive_grad_clip])
def test_a_state_that_is_made_outside(make, checked):
    clip = make(1.0, sharded_over="x")
    state = clip.init(FACTORS)
    run = functools.partial(
        in_parts, clip.update, (P("x"), P(), P("x")), out_specs=(P("x"), P()), check_vma=checked
    )
    chex.assert_trees_all_close(
        run(FACTORS, state, FACTORS), make(1.0).update(FACTORS, state, FACTORS), rtol=1e-6
    )
