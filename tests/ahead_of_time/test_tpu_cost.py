"""What a step costs on TPU v5e, by the compiler: no more than Optax's clipping, and nothing for
what is recorded.
"""

import optax
import pytest

import optaxclip
from benchmarks.ahead_of_time import cost
from benchmarks.trees import gpt2
from optaxclip import scopes, telemetry, thresholds

PARAMS = gpt2()


def with_adam(*clips):
    return cost(optax.chain(*clips, optax.adam(1e-3)), PARAMS)


@pytest.fixture(scope="module")
def optax_global_norm():
    return with_adam(optax.clip_by_global_norm(1.0))


def test_the_counter_knows_what_is_known():
    assert with_adam().units == pytest.approx(7, abs=1e-3)
    assert cost(optax.sgd(0.1, momentum=0.9), PARAMS).units == pytest.approx(5, abs=1e-3)


@pytest.mark.parametrize("record", [True, False])
def test_global_norm_costs_what_it_costs_in_optax(optax_global_norm, record):
    ours = with_adam(optaxclip.clip_by_global_norm(1.0, record=record))
    assert ours.units <= 1.01 * optax_global_norm.units
    assert ours.kernels <= optax_global_norm.kernels
    assert ours.temporary <= 0.1


@pytest.mark.parametrize(
    "clip", [optaxclip.clip_by_norm(1.0), optaxclip.clip_by_block_rms(1.0)], ids=["norm", "rms"]
)
def test_a_norm_per_leaf_costs_no_more_than_a_global_one(optax_global_norm, clip):
    ours = with_adam(clip)
    assert ours.units <= 1.01 * optax_global_norm.units
    assert ours.temporary <= 0.1


ADAPTIVE = [
    "autoclip",
    "quantile_clip",
    "zclip",
    "adagc",
    "history_clip",
    "log_norm_clip",
    "growth_clip",
    "gradient_stabilizer",
]


@pytest.mark.parametrize("scope", [scopes.tree(), scopes.leaf()], ids=["tree", "leaf"])
@pytest.mark.parametrize("name", ADAPTIVE)
def test_a_threshold_that_learns_costs_no_more_than_a_constant_one(optax_global_norm, name, scope):
    ours = with_adam(getattr(optaxclip, name)(scope=scope))
    assert ours.units <= 1.01 * optax_global_norm.units
    assert ours.temporary <= 0.1


def test_a_monitor_costs_what_a_norm_costs_and_nothing_in_front_of_a_clip(optax_global_norm):
    for clips in [telemetry.monitor()], [telemetry.monitor(), optaxclip.clip_by_global_norm(1.0)]:
        assert with_adam(*clips).units <= 1.01 * optax_global_norm.units


def test_by_value_costs_nothing():
    assert with_adam(optaxclip.clip_by_value(1.0)).units == pytest.approx(7, abs=1e-3)


def test_adaptive_grad_clip_reads_both_trees_once_more_in_no_more_kernels_than_in_optax():
    ours, peer = (
        with_adam(optaxclip.adaptive_grad_clip(0.01)),
        with_adam(optax.adaptive_grad_clip(0.01)),
    )
    assert ours.units <= min(9, peer.units)
    assert ours.kernels <= peer.kernels


GUARDS = {
    "not finite": optaxclip.skip_nonfinite,
    "spikes": lambda inner: optaxclip.skip_spikes(inner, thresholds.zscore(4.0)),
}


@pytest.mark.parametrize("name", GUARDS)
def test_to_skip_bad_steps_costs_nothing_besides_the_clip(name):
    chain = optax.chain(optaxclip.clip_by_global_norm(1.0), optax.adam(1e-3))
    plain, ours = cost(chain, PARAMS), cost(GUARDS[name](chain), PARAMS)
    optax_chain = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    peer = cost(optax.apply_if_finite(optax_chain, 5), PARAMS)
    assert ours.units <= 1.005 * plain.units and ours.temporary <= 0.1
    assert peer.units >= 1.3 * ours.units and peer.temporary >= 1
