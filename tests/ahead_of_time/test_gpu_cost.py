"""What a step costs on an NVIDIA GPU, by the compiler: no more bytes than Optax's clipping, and a
fraction of the kernels.
"""

import jax
import jax.numpy as jnp
import optax
import pytest

import optaxclip
from benchmarks.ahead_of_time import cost
from benchmarks.trees import gpt2, tiny

CLIPS = {
    "global norm": optaxclip.clip_by_global_norm(1.0),
    "leaf norm": optaxclip.clip_by_norm(1.0),
    "autoclip": optaxclip.autoclip(),
    "adagc": optaxclip.adagc(),
}


def with_adam(params, *clips):
    return cost(optax.chain(*clips, optax.adam(1e-3)), params, "h100")


@pytest.fixture(scope="module")
def peer():
    return with_adam(gpt2(), optax.clip_by_global_norm(1.0))


@pytest.mark.parametrize("name", CLIPS)
def test_a_norm_costs_one_read_and_fewer_kernels_than_there_are_leaves(peer, name):
    ours = with_adam(gpt2(), CLIPS[name])
    assert ours.units <= 1.001 * peer.units
    assert ours.temporary <= 0.01
    assert ours.kernels < len(jax.tree.leaves(gpt2())) < peer.kernels


@pytest.mark.parametrize("name", CLIPS)
def test_kernels_hardly_grow_with_leaves(name):
    few, many = (with_adam(tiny(leaves), CLIPS[name]).kernels for leaves in (20, 200))
    assert many - few <= 0.25 * (200 - 20)


def test_kernels_of_the_peer_grow_with_leaves():
    assert with_adam(tiny(200), optax.clip_by_global_norm(1.0)).kernels > 400


def test_a_guard_adds_a_handful_of_kernels():
    chain = optax.chain(CLIPS["global norm"], optax.adam(1e-3))
    plain, guarded = (
        cost(chain, gpt2(), "h100"),
        cost(optaxclip.skip_nonfinite(chain), gpt2(), "h100"),
    )
    assert guarded.kernels <= plain.kernels + 8
    assert guarded.units <= 1.001 * plain.units


def test_leaves_of_16_bits_are_joined_as_well():
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), tiny(200))
    assert with_adam(half, CLIPS["global norm"]).kernels < 100
