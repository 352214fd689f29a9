"""What a step costs each of 16 TPU chips that share the parameters, by the compiler: one message,
one read of the gradients.
"""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P
from transforms import CASES, SCALERS

import optaxclip
from benchmarks.ahead_of_time import cost, cost_on_mesh, longest_split, mesh_of
from benchmarks.trees import gpt2
from optaxclip import norms, responses, scopes, skip_nonfinite, skip_spikes, thresholds

TOPOLOGIES = ["v5e:4x4", "v6e:4x4", "v5p:2x2x4"]
MODEL = gpt2(2, 2048, vocabulary=50304)  # a vocabulary that 16 chips can share
# One layer of a model of 70 billion parameters: two matrices of 1 GiB and their biases.
LAYER = {
    name: leaf for name, leaf in gpt2(1, 8192)["block0"].items() if name.startswith(("up", "down"))
}
# along which the numbers of a unit are split
FAN_IN = {
    "down": "chips",
    "down_bias": (),
    "up": (),
    "up_bias": (),
}
GLOBAL_NORM = optaxclip.clip_by_global_norm(1.0)


def chips(topology):
    return mesh_of(topology, chips=16)


def matrices_split(shape):
    """Matrices are split, and all chips have the vectors."""
    return longest_split(shape) if len(shape) > 1 else P()


def with_adam(*clips):
    return optax.chain(*clips, optax.adam(1e-3))


def on_layer(optimizer, where, topology="v5e:4x4"):
    return cost_on_mesh(
        optimizer, LAYER, chips(topology), matrices_split, mapped=where == "shard_map"
    )


# Every transform


# has a test of its own
TRANSFORMS = {case.name: case for case in reversed(CASES + SCALERS) if case.name != "spectral_clip"}
# Limits other than one message, and one read of the gradients on top of Adam's 7 units.
MESSAGES = {
    "clip_by_value": 2,  # measures nothing, but records the largest size and the clipped share
    "spam_clip": 2,
    "error_feedback": 2,
    "adaptive_grad_clip": 3,  # of gradients and parameters, in one; and those two
}
UNITS = {
    "clip_by_value": 7,
    "adaptive_grad_clip": 9,  # reads the parameters, too
    "clippy": 9,
    "spam_clip": 9,  # reads and writes a mean for each element
    "clip_by_trust_ratio": 9,  # reads the weights
    "scale_by_stable_adam": 9,  # is Adam, and measures gradients over the root of its second moment
    "error_feedback": 13,  # reads and writes what it carries, and stores the sum
}
TEMPORARY = {"error_feedback": 1.01, "clip_by_trust_ratio": 0.011}


def training(name, **options):
    clip = TRANSFORMS[name].make(1.0, **options)
    return optax.chain(clip, optax.sgd(1e-3)) if name == "scale_by_stable_adam" else with_adam(clip)


def assert_cheap(name, found):
    assert found.messages <= MESSAGES.get(name, 1)
    assert found.units <= UNITS.get(name, 8) + 0.005
    assert found.temporary <= TEMPORARY.get(name, 0.01)


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_transform_on_16_chips(name, topology):
    assert_cheap(name, on_layer(training(name), "jit", topology))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_transform_on_16_chips_in_shard_map(name):
    options = {"sharded_over": FAN_IN} if name == "adaptive_grad_clip" else {}
    assert_cheap(name, on_layer(training(name, **options), "shard_map"))


@pytest.mark.parametrize("kind", ["v5e", "v5p", "v6e"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_transform_on_one_chip(name, kind):
    assert_cheap(name, cost(training(name), LAYER, kind))


@pytest.mark.parametrize("where", ["jit", "shard_map"])
def test_what_is_neither_measured_nor_recorded_sends_nothing(where):
    assert on_layer(with_adam(optaxclip.clip_by_value(1.0, record=False)), where).messages == 0


SCOPES = {
    "tree": scopes.tree(),
    "group": scopes.group(lambda path: path.split("_")[0]),
    "leaf": scopes.leaf(),
}


@pytest.mark.parametrize("where", ["jit", "shard_map"])
@pytest.mark.parametrize("scope", SCOPES)
def test_any_scope_down_to_leaves_takes_exactly_one_message(scope, where):
    rule = thresholds.reset_after(thresholds.window_zscore(3.0), 50)
    ours = on_layer(skip_nonfinite(with_adam(optaxclip.clip(rule, scope=SCOPES[scope]))), where)
    assert ours.messages == 1
    assert ours.units <= 8.005


def test_a_norm_of_powers_takes_a_second_read_and_message():
    for where in "jit", "shard_map":
        ours = on_layer(with_adam(optaxclip.clip(1.0, scopes.tree(), norm=norms.lp(3))), where)
        assert ours.messages == 2 and ours.units <= 9


@pytest.mark.parametrize("clip", [GLOBAL_NORM, optaxclip.clip_by_norm(1.0)], ids=["tree", "leaf"])
def test_matrices_split_along_both_axes_of_a_mesh(clip):
    def split(shape):
        return P("rows", "columns") if len(shape) > 1 else P()

    mesh = mesh_of("v5e:4x4", rows=4, columns=4)
    for mapped in False, True:
        ours = cost_on_mesh(with_adam(clip), LAYER, mesh, split, mapped=mapped)
        assert ours.messages == 1 and ours.units <= 8.005


# Beside Optax, on other chips


@functools.cache
def optax_on(topology):
    return cost_on_mesh(with_adam(optax.clip_by_global_norm(1.0)), MODEL, chips(topology))


OPTIMIZERS = {
    "clip_by_global_norm": with_adam(GLOBAL_NORM),
    "clip_by_norm": with_adam(optaxclip.clip_by_norm(1.0)),
    "autoclip": with_adam(optaxclip.autoclip()),
    "adagc": with_adam(optaxclip.adagc()),
    "skip_nonfinite": skip_nonfinite(with_adam(GLOBAL_NORM)),
    "skip_spikes": skip_spikes(with_adam(GLOBAL_NORM), thresholds.zscore(4.0)),
}


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_on_16_chips_a_step_moves_as_many_bytes_as_with_optax(name, topology):
    ours = cost_on_mesh(OPTIMIZERS[name], MODEL, chips(topology))
    assert ours.units <= 1.01 * optax_on(topology).units
    assert ours.messages == optax_on(topology).messages == 1


@pytest.mark.parametrize("kind", ["v5p", "v6e"])
def test_on_one_chip_of_other_kinds(kind):
    ours, theirs = (
        cost(with_adam(clip), MODEL, kind) for clip in (GLOBAL_NORM, optax.clip_by_global_norm(1.0))
    )
    assert ours.units <= 1.01 * theirs.units
    assert ours.temporary <= 0.01


def test_in_shard_map_optax_sends_nothing_since_each_part_is_clipped_alone():
    for clip, messages in (GLOBAL_NORM, 1), (optax.clip_by_global_norm(1.0), 0):
        assert (
            cost_on_mesh(with_adam(clip), LAYER, chips("v5e:4x4"), mapped=True).messages == messages
        )


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_adaptive_grad_clip_on_16_chips(topology):
    clips = optaxclip.adaptive_grad_clip(0.01), optax.adaptive_grad_clip(0.01)
    ours, theirs = (cost_on_mesh(with_adam(clip), LAYER, chips(topology)) for clip in clips)
    assert ours.units <= 1.01 * theirs.units
    assert ours.messages <= 2  # Optax records nothing, and sends one


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("iterations", [None, 10])
def test_spectral_clip_compiles_for_matrices_that_are_split(iterations, topology):
    clip = optaxclip.spectral_clip(1.0, response=responses.smooth, iterations=iterations)
    matrix = {"w": jax.ShapeDtypeStruct((128, 256), jnp.float32)}
    assert cost_on_mesh(with_adam(clip), matrix, chips(topology)).messages > 0
