"""Names of mapped axes: those that do not exist are refused; in `pmap`, what can be known and what
must be said.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import optaxclip
from optaxclip import per_example, scopes, skip_nonfinite, skip_spikes, telemetry

GRADS = jnp.arange(1.0, 33.0).reshape(4, 4, 2)  # one matrix for each of four devices


def updated(transform, grads, state=None):
    return transform.update(grads, transform.init(grads) if state is None else state)[0]


def made_by(make):
    return lambda grads, **options: updated(make(**options), grads)


def of_cotangent(grads, **options):
    return jax.grad(lambda x: jnp.sum(grads * optaxclip.clip_cotangent(x, 1.0, **options)))(
        jnp.ones_like(grads)
    )


def of_examples(grads, **options):
    clipped = per_example.clipped_grad(lambda w, x: jnp.sum(w * x), 1.0, **options)
    return grads * clipped(jnp.ones(grads.shape[1:]), grads)[1]


def of_given_examples(grads, **options):
    clip = per_example.aggregate(1.0, **options)
    return grads * clip.update(grads, clip.init(grads[0]))[0]


CASES = {
    "tree": made_by(lambda **options: optaxclip.clip(1.0, scopes.tree(), **options)),
    "group": made_by(
        lambda **options: optaxclip.clip(1.0, scopes.group(lambda path: "all"), **options)
    ),
    "leaf": made_by(lambda **options: optaxclip.clip(1.0, scopes.leaf(), **options)),
    "unit": made_by(lambda **options: optaxclip.clip(1.0, scopes.unit(), **options)),
    "value": made_by(lambda **options: optaxclip.clip_by_value(1.0, **options)),
    "rule": made_by(lambda **options: optaxclip.autoclip(**options)),
    "nonfinite": made_by(lambda **options: skip_nonfinite(optax.sgd(1.0), **options)),
    "spikes": made_by(lambda **options: skip_spikes(optax.sgd(1.0), 1.0, **options)),
    "monitor": made_by(lambda **options: telemetry.monitor(**options)),
    "spectral": made_by(lambda **options: optaxclip.spectral_clip(1.0, **options)),
    "cotangent": of_cotangent,
    "examples": of_examples,
    "given examples": of_given_examples,
}
MESH = (4,), ("x",)


def in_shard_map(check_vma):
    def place(run):
        mesh = jax.make_mesh(*MESH, axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
        each = {"in_specs": P("x"), "out_specs": P("x"), "check_vma": check_vma}
        return jax.jit(jax.shard_map(lambda x: run(x[0])[None], mesh=mesh, **each))(GRADS)

    return place


def in_mesh(kind):
    def place(run):
        with jax.set_mesh(jax.make_mesh(*MESH, axis_types=(kind,), devices=jax.devices()[:4])):
            return jax.jit(run)(GRADS[0])

    return place


def in_pmap(run, **options):
    return jax.pmap(run, devices=jax.devices()[:4], **options)(GRADS)


def in_vmap_in_shard_map(run):
    return in_shard_map(True)(lambda x: jax.vmap(run, axis_name="y")(x[None])[0])


PLACES = {  # with the axes that there are
    "eager": (lambda run: run(GRADS[0]), ()),
    "jit": (lambda run: jax.jit(run)(GRADS[0]), ()),
    "jit in a mesh": (in_mesh(AxisType.Auto), ()),
    "jit in an explicit mesh": (in_mesh(AxisType.Explicit), ()),
    "shard_map": (in_shard_map(True), ("x",)),
    "shard_map, unchecked": (in_shard_map(False), ("x",)),
    "vmap": (lambda run: jax.vmap(run, axis_name="x")(GRADS), ("x",)),
    "vmap without a name": (lambda run: jax.vmap(run)(GRADS), ()),
    "vmap in shard_map": (in_vmap_in_shard_map, ("x", "y")),
    "pmap": (lambda run: in_pmap(run, axis_name="x"), ("x",)),
    "pmap without a name": (in_pmap, ()),
}


def refused(missing, axes):
    where = re.escape(f"got {missing} where {axes or 'none'} are mapped; ")
    return pytest.raises(ValueError, match=f"^sharded_over must name mapped axes, {where}")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("case", CASES)
def test_an_axis_that_does_not_exist_is_refused(case, place):
    mapped, axes = PLACES[place]
    for given in "typo", ("typo",):
        with refused(("typo",), axes):
            mapped(lambda x, given=given: CASES[case](x, sharded_over=given))


@pytest.mark.parametrize("case", CASES)
def test_one_name_that_exists_does_not_hide_another(case):
    for place in "shard_map", "shard_map, unchecked", "pmap", "vmap":
        with refused(("typo",), ("x",)):
            PLACES[place][0](lambda x: CASES[case](x, sharded_over=("x", "typo")))


def test_a_tree_of_names_is_looked_at_leaf_by_leaf():
    def run(x):
        clip = optaxclip.clip_by_norm(1.0, sharded_over={"a": "x", "b": "typo"})
        return updated(clip, {"a": x, "b": x})["a"]

    for place in "shard_map, unchecked", "pmap", "vmap":
        with refused(("typo",), ("x",)):
            PLACES[place][0](run)


@pytest.mark.parametrize("given", [3, {"x"}, ""])
def test_what_is_no_name_at_all_is_refused(given):
    with refused((given,), ("x",)):
        PLACES["shard_map"][0](
            lambda x: updated(optaxclip.clip(1.0, scopes.tree(), sharded_over=given), x, ANY_STATE)
        )


ANY_STATE = optaxclip.clip(1.0, scopes.tree()).init(GRADS[0])
STATES = {
    "clip": lambda **options: optaxclip.clip_by_global_norm(1.0, **options),
    "rule": lambda **options: optaxclip.autoclip(**options),
    "unit": lambda **options: optaxclip.clip(1.0, scopes.unit(), **options),
    "value": lambda **options: optaxclip.clip_by_value(1.0, **options),
    "nonfinite": lambda **options: skip_nonfinite(optax.sgd(1.0), **options),
    "spikes": lambda **options: skip_spikes(optax.sgd(1.0), 1e3, **options),
    "monitor": lambda **options: telemetry.monitor(**options),
    "spectral": lambda **options: optaxclip.spectral_clip(1.0, **options),
    "examples": lambda **options: per_example.aggregate(1.0, **options),
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_may_be_made_before_axes_are_mapped(name):
    transform, want = STATES[name](sharded_over="x"), STATES[name]().init(GRADS[0])
    for make in (
        transform.init,
        jax.jit(transform.init),
        lambda x: jax.eval_shape(transform.init, x),
    ):
        assert jax.tree.map(np.shape, make(GRADS[0])) == jax.tree.map(np.shape, want)


@pytest.mark.parametrize(
    "name", [name for name in STATES if name not in ("unit", "spectral", "examples")]
)
def test_such_a_state_is_used_where_they_are_mapped(name):
    transform, whole = STATES[name](sharded_over="x"), STATES[name]()
    state, want = transform.init(GRADS[0]), updated(whole, GRADS)
    for place in "shard_map", "shard_map, unchecked", "pmap", "vmap":
        found = PLACES[place][0](lambda x: updated(transform, x, state))
        np.testing.assert_allclose(found, want, rtol=1e-6)


# pmap


def one_by_one(case):
    return jnp.stack([jax.jit(CASES[case])(x) for x in GRADS])


@pytest.mark.parametrize("case", CASES)
def test_in_pmap_without_a_name_every_device_has_whole_gradients(case):
    np.testing.assert_allclose(in_pmap(CASES[case]), one_by_one(case), rtol=1e-5)


@pytest.mark.parametrize(
    "scope", [scopes.tree(), scopes.unit(), scopes.element()], ids=["tree", "unit", "element"]
)
def test_in_pmap_without_a_name_the_record_is_of_one_device(scope):
    clip = optaxclip.clip(1.0, scope)
    found = in_pmap(lambda x: clip.update(x, clip.init(x))[1].reading.size_before)
    want = [clip.update(x, clip.init(x))[1].reading.size_before for x in GRADS]
    np.testing.assert_allclose(found, want, rtol=1e-6)


@pytest.mark.parametrize(
    "case", [case for case in CASES if "example" not in case and case != "value"]
)
@pytest.mark.parametrize("place", ["pmap", "shard_map, unchecked"])
def test_where_it_cannot_be_known_the_error_ends_in_the_line_to_write(place, case):
    words = r"^sharded_over must be given .*those of \('x',\) .*, sharded_over=\(\)(\n|$)"
    with pytest.raises(ValueError, match=words):
        PLACES[place][0](CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_that_line_gives_whole_gradients(case):
    found = in_pmap(lambda x: CASES[case](x, sharded_over=()), axis_name="x")
    np.testing.assert_allclose(found, one_by_one(case), rtol=1e-5)
